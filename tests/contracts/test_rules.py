"""Every rank rule against its formula, on matrices whose rank is known, and through the layers that take it."""

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import lowrank_layers as lr

from .tables import (
    DECOMPOSITIONS,
    DERANDOMIZED,
    LAYERS,
    REFIT_RULES,
    RULES,
    SVD_METHODS,
    generator,
    spectrum,
    spectrum_of,
)

rows = pytest.mark.parametrize("row", RULES, ids=lambda row: row.name)

CLASSES = {
    lr.Energy: 0.9,
    lr.RelativeError: 0.1,
    lr.ParameterFraction: 0.5,
    lr.RankFraction: 0.5,
}
"""The rules that take a fraction, and a good one."""


def noisy_matrix(rank: int, shape: tuple[int, int], noise: float, seed: int = 0) -> torch.Tensor:
    """Entries of unit variance of exactly that rank, and white noise."""
    g = generator(seed)
    left = torch.randn(shape[0], rank, generator=g, dtype=torch.float64)
    right = torch.randn(rank, shape[1], generator=g, dtype=torch.float64)
    dirt = torch.randn(*shape, generator=g, dtype=torch.float64)
    return left @ right / math.sqrt(max(rank, 1)) + noise * dirt


def values_of(*values: float) -> lr.Spectrum:
    return spectrum_of(torch.tensor(values, dtype=torch.float64), (len(values), len(values)))


# ------------------------------------------------------------------------------------ rules on singular values


@rows
@DERANDOMIZED
@given(
    shape=st.tuples(st.integers(3, 24), st.integers(3, 24)),
    rank=st.integers(0, 6),
    noise=st.floats(0.05, 2),
    seed=st.integers(0, 2**20),
)
def test_it_equals_its_formula(row, shape, rank, noise, seed):
    seen = spectrum(noisy_matrix(rank, shape, noise, seed))
    assert row.rule(seen) == row.reference(np.asarray(seen.values), shape)


@rows
def test_it_equals_its_formula_on_larger_matrices(row):
    for seed, shape in enumerate([(64, 96), (96, 64), (80, 80), (16, 200)]):
        for rank in (0, 5, 12):
            seen = spectrum(noisy_matrix(rank, shape, 0.2, seed))
            assert row.rule(seen) == row.reference(np.asarray(seen.values), shape)


@rows
@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40), (30, 300), (300, 30)], ids=str)
def test_it_equals_its_formula_on_smooth_spectra(row, shape):
    """No gap to hide in: here every constant counts."""
    for power in (0.3, 0.5, 0.8, 1.2, 2.0, 3.0):
        values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
        assert row.rule(spectrum_of(values, shape)) == row.reference(np.asarray(values), shape), power


@rows
def test_the_answer_is_a_rank(row):
    spectra = [
        values_of(1.0),
        values_of(1.0, 1.0, 1.0, 1.0),
        values_of(5.0, 0.0, 0.0),
        values_of(0.0, 0.0, 0.0),
        values_of(2.0, 1.0),
        spectrum_of(torch.tensor([3.0]), (1, 20)),
        spectrum_of(torch.tensor([3.0, 1.0]), (2, 20)),
        spectrum(noisy_matrix(0, (40, 60), 1.0)),
        spectrum(noisy_matrix(3, (40, 60), 0.0)),
    ]
    for seen in spectra:
        rank = row.rule(seen)
        assert type(rank) is int
        assert 1 <= rank <= len(seen.values)


@rows
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40, 2.0**-900, 2.0**900], ids=str)
def test_units_do_not_matter(row, scale):
    for seed in range(5):
        seen = spectrum(noisy_matrix(4, (30, 40), 0.3, seed))
        scaled = dataclasses.replace(seen, values=seen.values * scale)
        assert row.rule(scaled) == row.rule(seen)


@rows
def test_neither_orientation_nor_precision_matters(row):
    matrix = noisy_matrix(6, (40, 64), 0.2)
    assert row.rule(spectrum(matrix)) == row.rule(spectrum(matrix.mT))
    seen = spectrum(matrix)
    assert row.rule(dataclasses.replace(seen, values=seen.values.float())) == row.rule(seen)


@rows
def test_it_looks_and_does_not_touch(row):
    seen = spectrum(noisy_matrix(4, (20, 30), 0.3))
    before, state = seen.values.clone(), torch.get_rng_state()
    assert row.rule(seen) == row.rule(seen)
    assert torch.equal(seen.values, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("row", RULES + REFIT_RULES, ids=lambda row: row.name)
def test_it_is_a_frozen_value(row):
    assert isinstance(row.rule, lr.RankRule)
    assert copy.deepcopy(row.rule) == row.rule
    assert pickle.loads(pickle.dumps(row.rule)) == row.rule
    assert len({row.rule, copy.deepcopy(row.rule)}) == 1
    assert repr(row.rule).startswith(type(row.rule).__name__ + "(")
    for field in dataclasses.fields(row.rule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(row.rule, field.name, 0.3)


@rows
def test_without_singular_values_it_is_refused_with_the_remedy(row):
    with pytest.raises(lr.LowRankError, match=r"^test: got .*no singular values.*ParameterFraction"):
        row.rule(spectrum_of(None, (4, 5)))


@rows
def test_layers_take_it(row):
    matrix = noisy_matrix(5, (24, 36), 0.1).float()
    linear = nn.Linear(36, 24)
    with torch.no_grad():
        linear.weight.copy_(matrix)
    expected = row.rule(spectrum(matrix))
    assert lr.LowRankLinear.from_dense(linear, rank=row.rule).rank == expected
    conv = nn.Conv2d(4, 24, 3)
    with torch.no_grad():
        conv.weight.copy_(matrix.reshape(conv.weight.shape))
    assert lr.LowRankConv2d.from_dense(conv, rank=row.rule).rank == expected
    unfoldings = (conv.weight.detach().movedim(mode, 0).flatten(1) for mode in (0, 1))
    assert lr.TuckerConv2d.from_dense(conv, rank=row.rule).rank == tuple(row.rule(spectrum(u)) for u in unfoldings)
    with pytest.raises(lr.LowRankError, match=r"^CPConv2d: got .*no singular values.*ParameterFraction"):
        lr.CPConv2d.from_dense(conv, rank=row.rule)


@rows
@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (20, 88)], ids=str)
def test_decompositions_take_it(row, shape):
    """Each entry of the matrix is positive, so that it has all factorizations."""
    matrix = noisy_matrix(5, shape, 0.1) + 8
    expected = row.rule(spectrum(matrix))
    for method in SVD_METHODS:
        f = lr.svd(matrix, row.rule, method=method)
        assert f.rank == expected
        assert torch.allclose(f.s, torch.linalg.svdvals(matrix)[:expected])
    assert lr.nmf(matrix, row.rule, sweeps=1).rank == expected
    tensor = matrix.reshape(shape[0], shape[1] // 4, 2, 2)
    each = [row.rule(spectrum(tensor.movedim(mode, 0).flatten(1))) for mode in range(4)]
    assert lr.tucker(tensor, row.rule).rank == tuple(each)
    mixed = lr.tucker(tensor, (row.rule, 3, None, row.rule))
    assert mixed.rank == (each[0], 3, 2, each[3])
    assert mixed.factors[2] is None
    with pytest.raises(lr.LowRankError, match=r"^cp: got .*no singular values.*ParameterFraction"):
        lr.cp(tensor, row.rule)


@rows
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100], ids=str)
def test_decompositions_do_not_mind_units(row, scale):
    matrix = (noisy_matrix(5, (20, 30), 0.1) + 8).float()
    for decompose in (lr.svd, lr.nmf):
        assert decompose(matrix * scale, row.rule).rank == row.rule(spectrum(matrix))


def test_the_error_asked_for_is_reached():
    for seed, bound in enumerate((0.5, 0.1, 0.01)):
        matrix = noisy_matrix(6, (40, 30), 0.2, seed)
        assert lr.svd(matrix, lr.RelativeError(bound)).relative_error(matrix) <= bound
        # what all modes lose together is at most the sum of what each loses (De Lathauwer et al., 2000)
        tensor = matrix.reshape(40, 5, 6)
        assert lr.tucker(tensor, lr.RelativeError(bound / math.sqrt(3))).relative_error(tensor) <= bound


# -------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("seed", range(3))
def test_rank_sixteen_is_recovered_from_noise(seed):
    """True rank 16 in 256 x 384: the rules that know noise say 16, 90 % of the energy says about 77."""
    seen = spectrum(noisy_matrix(16, (256, 384), 0.58, seed))
    assert lr.EVBMF()(seen) == 16
    assert lr.GavishDonoho()(seen) == 16
    assert lr.ResidualWhiteness()(seen) == 16
    # the elbow of a slowly falling noise floor lies a value or two inside it; with less noise it is sharp
    assert lr.Elbow()(spectrum(noisy_matrix(16, (256, 384), 0.1, seed))) == 16
    assert 70 <= lr.Energy(0.9)(seen) <= 90


@pytest.mark.parametrize("row", [row for row in RULES if row.noiseless], ids=lambda row: row.name)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64), (30, 240)], ids=str)
def test_a_rank_far_above_the_noise_is_recovered(row, rank, shape):
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator(1))).Q
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator(2))).Q
    matrix = 20 * left @ right.mT + 0.05 * torch.randn(shape, generator=generator(3))
    assert row.rule(spectrum(matrix)) == rank


@pytest.mark.parametrize("shape", [(64, 64), (50, 200), (256, 384), (7, 300)], ids=str)
def test_evbmf_on_pure_noise_is_one_not_zero(shape):
    for seed in range(5):
        assert lr.EVBMF()(spectrum(noisy_matrix(0, shape, 1.0, seed))) == 1
    assert lr.EVBMF()(spectrum(nn.Linear(shape[1], shape[0]).weight.detach())) == 1


def test_the_residual_of_pure_noise_is_white_99_times_in_100():
    """Of 300 matrices of noise, 3 are expected to have more than rank 1; 12 or more have a chance below 1e-4."""
    answers = [lr.ResidualWhiteness()(spectrum(noisy_matrix(0, (40, 60), 1.0, seed))) for seed in range(300)]
    assert sum(answer > 1 for answer in answers) < 12


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_and_stable_rank_are_the_rank_of_equal_singular_values(rank):
    """Without noise. Noise of a thousandth per entry moves the stable rank by nothing, the effective rank by a lot."""
    left = torch.linalg.qr(torch.randn(60, rank, generator=generator(1), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(90, rank, generator=generator(2), dtype=torch.float64)).Q
    exact = left @ right.mT
    assert lr.EffectiveRank()(spectrum(exact)) == lr.StableRank()(spectrum(exact)) == rank
    noisy = spectrum(exact + 1e-3 * torch.randn(60, 90, generator=generator(3), dtype=torch.float64))
    assert lr.StableRank()(noisy) == rank < lr.EffectiveRank()(noisy)


def test_gavish_donoho_is_four_over_root_three_for_known_noise():
    """The factor on the median for a square matrix, 2.858, is 4/sqrt(3) over the root of the median eigenvalue."""
    values = torch.ones(99, dtype=torch.float64)
    for first, expected in ((2.85, 1), (2.87, 2)):
        values[:2] = torch.tensor([10.0, first])
        assert lr.GavishDonoho()(spectrum_of(values, (99, 99))) == expected


def test_gavish_donoho_takes_the_median_between_the_middle_two():
    """An even number of values: the median of 9, 8, 2, 1 is 5 (the threshold 14.3), not 2 (5.7)."""
    assert lr.GavishDonoho()(values_of(9, 8, 2, 1)) == 1
    assert lr.GavishDonoho()(values_of(9, 8, 2, 2, 1)) == 2


def test_elbow_stops_before_the_floor():
    assert lr.Elbow()(values_of(9.0, 8.0, 0.5, 0.4, 0.3)) == 2
    assert lr.Elbow()(values_of(10.0, 1.0, 0.9, 0.8)) == 1
    assert lr.Elbow()(values_of(4.0, 3.0, 2.0, 1.0)) == 1


def test_energy_by_hand():
    seen = values_of(3, 1, 0.1)  # energies 9, 1 and 0.01
    assert [lr.Energy(fraction)(seen) for fraction in (0.5, 0.89, 0.95, 0.9985, 0.9999, 1)] == [1, 1, 2, 2, 3, 3]
    assert lr.Energy(1.0)(values_of(3, 1, 0)) == 2
    assert lr.Energy(0.01)(seen) == 1


def test_energy_that_is_just_enough_is_enough():
    """9 of 10 is nine tenths: ``sum s_i^2 >= fraction * sum``, as the formula says."""
    assert lr.Energy(0.9)(values_of(3, 1)) == 1
    assert lr.Energy(0.5)(values_of(2, 2)) == 1
    assert lr.Energy(0.8)(values_of(4, 2)) == 1


def test_relative_error_that_is_just_enough_is_enough():
    """What rank 1 leaves of (4, 3) is exactly 3/5."""
    assert lr.RelativeError(0.6)(values_of(4, 3)) == 1
    assert lr.RelativeError(0.5)(values_of(math.sqrt(3), 1)) in (1, 2)  # sqrt(3) is rounded


@DERANDOMIZED
@given(
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    rank=st.integers(0, 8),
    noise=st.floats(0.01, 1),
    seed=st.integers(0, 2**20),
)
def test_energy_grows_with_the_fraction(fractions, rank, noise, seed):
    seen = spectrum(noisy_matrix(rank, (18, 13), noise, seed))
    low, high = sorted(fractions)
    assert lr.Energy(low)(seen) <= lr.Energy(high)(seen)
    if high < 1:
        assert lr.RelativeError(low)(seen) >= lr.RelativeError(high)(seen)


@DERANDOMIZED
@given(bound=st.floats(0.001, 0.999), noise=st.floats(0.01, 1), seed=st.integers(0, 2**20))
def test_relative_error_is_reached_and_one_rank_less_does_not_do(bound, noise, seed):
    matrix = noisy_matrix(5, (18, 13), noise, seed)
    rank = lr.RelativeError(bound)(spectrum(matrix))
    full = lr.svd(matrix)
    assert full.truncate(rank).relative_error(matrix) <= bound * (1 + 1e-9)
    assert rank == 1 or full.truncate(rank - 1).relative_error(matrix) > bound


@pytest.mark.parametrize("bound", [1e-5, 1e-7, 1.3e-8])
def test_relative_error_holds_for_bounds_near_rounding(bound):
    """1 - (1 - b^2) is not b^2 in floating point."""
    for lost, expected in ((bound * (1 - 1e-4), 1), (bound * (1 + 1e-4), 2)):
        assert lr.RelativeError(bound)(values_of(1.0, lost)) == expected


# ------------------------------------------------------------------------------------------ ParameterFraction

# binary fractions, so that the formula is exact in floating point
fractions = st.integers(1, 64).map(lambda k: k / 64)
sizes = st.tuples(st.integers(1, 400), st.integers(1, 400))


@DERANDOMIZED
@given(fraction=fractions, shape=sizes)
def test_parameter_fraction_of_a_matrix(fraction, shape):
    m, n = shape
    expected = max(1, int(fraction * m * n / (m + n)))
    rule = lr.ParameterFraction(fraction)
    assert rule(spectrum_of(None, shape)) == expected
    assert lr.LowRankLinear(n, m, device="meta", rank=rule).rank == expected
    assert lr.LowRankEmbedding(m, n, device="meta", rank=rule).rank == expected


@DERANDOMIZED
@given(fraction=fractions, channels=st.tuples(st.integers(1, 60), st.integers(1, 60)), kernel=st.integers(1, 5))
def test_parameter_fraction_of_a_kernel_as_a_matrix(fraction, channels, kernel):
    m, n = channels[0], channels[1] * kernel**2
    layer = lr.LowRankConv2d(channels[1], channels[0], kernel, device="meta", rank=lr.ParameterFraction(fraction))
    assert layer.rank == max(1, int(fraction * m * n / (m + n)))


def test_parameter_fraction_of_decimal_fractions():
    """The floor is taken of the fraction as written or of its nearest float, and of nothing further away."""
    for m in range(2, 40):
        for n in range(2, 40):
            for percent in (1, 10, 28, 29, 30, 50, 57, 58, 72, 75, 90, 100):
                written, stored = Fraction(percent, 100), Fraction(percent / 100)
                floors = {max(1, math.floor(fraction * m * n / (m + n))) for fraction in (written, stored)}
                assert lr.ParameterFraction(percent / 100)(spectrum_of(None, (m, n))) in floors, (m, n, percent)


@DERANDOMIZED
@given(
    fraction=st.floats(0.001, 1),
    channels=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_parameter_fraction_of_tucker_and_cp_layers_is_never_exceeded(fraction, channels, kernel):
    dense = math.prod((*channels, *kernel))
    for cls, least in ((lr.TuckerConv2d, (1, 1)), (lr.CPConv2d, 1)):
        layer = cls(channels[1], channels[0], kernel, bias=False, device="meta", rank=lr.ParameterFraction(fraction))
        stored = sum(p.numel() for p in layer.parameters())
        assert stored <= fraction * dense or layer.rank == least
    one_more = (layer.rank + 1) * (sum(channels) + sum(kernel))
    limit = dense // max(*channels, *kernel)
    assert one_more > fraction * dense or layer.rank == limit


def test_parameter_fraction_of_a_tucker_layer_uses_what_it_may():
    for fraction in (0.05, 0.1, 0.3, 0.6):
        layer = lr.TuckerConv2d(64, 96, 3, bias=False, device="meta", rank=lr.ParameterFraction(fraction))
        stored = sum(p.numel() for p in layer.parameters())
        assert 0.9 * fraction * 64 * 96 * 9 < stored <= fraction * 64 * 96 * 9
        assert layer.rank[0] / 96 == pytest.approx(layer.rank[1] / 64, abs=0.02)


@DERANDOMIZED
@given(fraction=fractions, shape=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_parameter_fraction_of_decompositions_is_that_of_layers(fraction, shape):
    rule = lr.ParameterFraction(fraction)
    expected = lr.LowRankLinear(shape[1], shape[0], device="meta", rank=rule).rank
    matrix = torch.rand(shape, generator=generator(0))
    assert lr.svd(matrix, rule).rank == expected
    assert lr.nmf(matrix, rule, sweeps=1).rank == expected
    kernel = torch.rand(*shape, 3, 2, generator=generator(1))
    assert lr.cp(kernel, rule, sweeps=1).rank == lr.CPConv2d(shape[1], shape[0], (3, 2), device="meta", rank=rule).rank


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("place", [(0, 1), (1,), (0,), (0, 1, 2, 3)], ids=str)
def test_parameter_fraction_of_tucker_uses_what_it_may(fraction, place):
    kernel = torch.randn(32, 48, 3, 3, generator=generator(2))
    rule = lr.ParameterFraction(fraction)
    f = lr.tucker(kernel, tuple(rule if mode in place else None for mode in range(4)), sweeps=0)
    more = [min(n, r + (mode in place)) for mode, (n, r) in enumerate(zip(kernel.shape, f.rank, strict=True))]
    too_much = math.prod(more) + sum(more[mode] * kernel.shape[mode] for mode in place)
    assert f.numel() <= fraction * kernel.numel() < too_much
    assert [mode for mode in range(4) if f.factors[mode] is not None] == sorted(place)
    parts = [f.rank[mode] / kernel.shape[mode] for mode in place if kernel.shape[mode] > 3]
    assert max(parts) - min(parts) < 0.04
    if len(place) == 4:
        assert lr.tucker(kernel, rule, sweeps=0).rank == f.rank


@DERANDOMIZED
@given(pair=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), shape=sizes)
def test_parameter_fraction_grows_with_the_fraction(pair, shape):
    low, high = (lr.ParameterFraction(fraction)(spectrum_of(None, shape)) for fraction in sorted(pair))
    assert 1 <= low <= high <= min(shape)


# ----------------------------------------------------------------------------------------------- RankFraction


@DERANDOMIZED
@given(fraction=fractions, shape=sizes)
def test_rank_fraction_of_a_matrix(fraction, shape):
    expected = max(1, math.floor(fraction * min(shape)))
    rule = lr.RankFraction(fraction)
    assert rule(spectrum_of(None, shape)) == expected
    assert lr.LowRankLinear(shape[1], shape[0], device="meta", rank=rule).rank == expected


def test_rank_fraction_of_decompositions_and_kernels():
    """CP's full rank is the largest of use: the product of all modes but the largest."""
    rule = lr.RankFraction(0.25)
    assert lr.svd(torch.randn(40, 60), rule).rank == 10
    assert lr.nmf(torch.rand(40, 60), rule, sweeps=1).rank == 10
    kernel = torch.randn(24, 16, 3, 3)
    assert lr.tucker(kernel, (rule, rule, None, None)).rank == (6, 4, 3, 3)
    assert lr.tucker(kernel, rule).rank == (6, 4, 1, 1)
    conv = nn.Conv2d(16, 24, 3)
    assert lr.TuckerConv2d.from_dense(conv, rank=rule).rank == lr.TuckerConv2d(16, 24, 3, rank=rule).rank == (6, 4)
    assert lr.LowRankConv2d.from_dense(conv, rank=rule).rank == 6
    assert lr.CPConv2d(16, 24, 3, device="meta", rank=rule).rank == 16 * 9 // 4
    assert lr.cp(torch.randn(6, 5, 4), rule, sweeps=1).rank == 5


def test_rank_fraction_of_every_layer_of_a_plan():
    model = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 40))
    assert [entry.rank for entry in lr.make_plan(model, rank=lr.RankFraction(0.25))] == [20, 10]


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("rule", CLASSES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("bad", [0, -0.5, 1.5, math.nan, math.inf, True, "a", None, [0.5]], ids=repr)
def test_bad_fractions_are_refused(rule, bad):
    with pytest.raises(lr.LowRankError, match=rf"^{rule.__name__}: got .*expected a number in \(0, 1"):
        rule(bad)


def test_the_ends_of_the_interval():
    assert lr.Energy(1).fraction == 1
    assert lr.ParameterFraction(1.0).fraction == 1
    with pytest.raises(lr.LowRankError, match=r"^RelativeError: got 1, expected a number in \(0, 1\)"):
        lr.RelativeError(1)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.name)
@pytest.mark.parametrize("rule", [lr.Energy, lr.EVBMF, lr.ParameterFraction], ids=lambda rule: rule.__name__)
def test_a_class_in_place_of_an_instance_is_refused_with_a_hint(layer, rule):
    with pytest.raises(lr.LowRankError, match=rf"^{layer.cls.__name__}.*Call the rule: {rule.__name__}\("):
        layer.from_dense(layer.dense(), rank=rule)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.name)
def test_a_fraction_in_place_of_a_rank_is_refused_with_a_hint(layer):
    with pytest.raises(
        lr.LowRankError, match=rf"^{layer.cls.__name__}.*got rank 0\.25.*write ParameterFraction\(0\.25\)"
    ):
        layer.from_dense(layer.dense(), rank=0.25)


@pytest.mark.parametrize("row", DECOMPOSITIONS, ids=lambda row: row.name)
def test_decompositions_take_any_function_of_a_spectrum(row):
    seen = []

    def rule(spectrum: lr.Spectrum) -> int:
        seen.append(spectrum)
        return 2

    tensor = row.sample()
    assert row(tensor, rule).rank == row.rank(2)
    assert {each.dense for each in seen} == {tensor.numel()}
    assert all(list(each.sizes) == sorted(each.sizes) and each.owner == row.function.__name__ for each in seen)
    for each in seen:
        assert each.values is None or len(each.values) <= len(each.sizes) <= 9
    assert row(tensor, lambda spectrum: 10_000).rank == row(tensor, row.full(row.shape)).rank
    for answer in (0, 2.0, True, None):
        with pytest.raises(lr.LowRankError, match=f"^{row.function.__name__}: the rule .* returned {answer!r}"):
            row(tensor, lambda spectrum, answer=answer: answer)
    for bad, hint in ((lr.Energy, r"Call the rule: Energy\("), (0.25, r"ParameterFraction\(0\.25\)")):
        with pytest.raises(lr.LowRankError, match=f"^{row.function.__name__}: got rank .*{hint}"):
            row(tensor, row.rank(bad))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.name)
def test_any_function_of_a_spectrum_is_a_rule(layer):
    seen = []

    def rule(spectrum: lr.Spectrum) -> int:
        seen.append(spectrum)
        return 2

    built = layer.from_dense(layer.dense(), rank=rule)
    assert built.rank in (2, (2,), (2, 2))
    assert all(isinstance(each, lr.Spectrum) for each in seen)
    assert {each.dense for each in seen} == {layer.dense().weight.numel()}
    assert isinstance(rule, lr.RankRule)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.name)
@pytest.mark.parametrize("answer", [0, -3, 2.0, True, None, "2"], ids=repr)
def test_a_rule_with_a_bad_answer_is_refused(layer, answer):
    with pytest.raises(
        lr.LowRankError, match=rf"^{layer.cls.__name__}: the rule .* returned {answer!r}, expected an int"
    ):
        layer.from_dense(layer.dense(), rank=lambda spectrum: answer)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda row: row.name)
def test_a_rule_with_too_large_an_answer_is_clamped(layer):
    dense = layer.dense()
    built = layer.from_dense(dense, rank=lambda spectrum: 10_000)
    assert built.rank == layer.full_rank(dense)
