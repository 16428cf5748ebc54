"""The mathematics of every factored layer: equal functions, errors, gradients, variances and costs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_layers as lr

from .layer_checks import (
    TIGHT,
    converted,
    no_padding_warning,
    rows,
    rows_and_variants,
    settings_of,
    unfolded,
    with_variants,
)
from .tables import LAYERS, LayerRow, relative

pytestmark = no_padding_warning


def check_full_rank(row: LayerRow, variant: str, batch: int | None) -> None:
    dense = row.dense(variant)
    factored = row.from_dense(dense, rank=row.full_rank(dense))
    x = row.input(dense, batch)
    if not x.is_floating_point():
        assert relative(factored(x), dense(x)) < TIGHT
        return
    x, again = x.requires_grad_(), x.detach().clone().requires_grad_()
    expected = dense(x)
    got = factored(again)
    assert relative(got, expected) < TIGHT
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert relative(again.grad, x.grad) < TIGHT


@rows_and_variants
def test_full_rank_computes_what_the_dense_layer_computes(row, variant):
    check_full_rank(row, variant, batch=2)


@with_variants(lambda row, variant: row.unbatched)
def test_full_rank_computes_what_the_dense_layer_computes_without_a_batch(row, variant):
    check_full_rank(row, variant, batch=None)


@rows_and_variants
def test_small_rank_computes_what_its_dense_form_computes(row, variant):
    _, factored = converted(row, variant)
    dense = factored.to_dense()
    assert type(dense) is row.cls.dense_type
    x = row.input(dense)
    assert relative(factored(x), dense(x)) < TIGHT


@rows_and_variants
def test_a_fresh_layer_computes_what_its_dense_form_computes(row, variant):
    factored = row.fresh(variant)
    dense = factored.to_dense()
    x = row.input(dense)
    assert relative(factored(x), dense(x)) < TIGHT


@rows_and_variants
def test_settings_survive_the_way_there_and_back(row, variant):
    dense, factored = converted(row, variant)
    back = factored.to_dense()
    assert settings_of(back) == settings_of(dense)
    assert (getattr(back, "bias", None) is None) == (getattr(dense, "bias", None) is None)
    assert back.weight.shape == dense.weight.shape
    again = row.from_dense(back, rank=factored.rank)
    x = row.input(dense)
    assert again.rank == factored.rank
    if row.again and (
        row.matrix is not None or isinstance(factored.rank, tuple)
    ):  # ALS does not promise to find its optimum twice
        assert relative(again(x), factored(x)) < TIGHT


@rows_and_variants
def test_the_constructor_takes_the_settings_that_from_dense_takes(row, variant):
    dense, factored = converted(row, variant)
    fresh = row.fresh(variant)
    assert fresh.rank == factored.rank
    assert repr(fresh) == repr(factored)
    assert settings_of(fresh) == settings_of(factored)
    fresh.load_state_dict(factored.state_dict())
    x = row.input(dense)
    assert torch.equal(fresh(x), factored(x))


@pytest.mark.parametrize("row", [row for row in LAYERS if row.channels_last], ids=lambda row: row.name)
def test_channels_last_changes_nothing(row):
    dense = row.dense().to(memory_format=torch.channels_last)
    x = row.input(dense).to(memory_format=torch.channels_last)
    full = row.from_dense(dense, rank=row.full_rank(dense)).to(memory_format=torch.channels_last)
    assert relative(full(x), dense(x)) < TIGHT
    assert relative(row.from_dense(dense, rank=row.full_rank(dense))(x), dense(x)) < TIGHT
    assert full(x).is_contiguous(memory_format=torch.channels_last)


@rows
def test_gradients_are_right_in_float64(row):
    _, layer = converted(row, dtype=torch.float64)
    x = row.input(layer.to_dense())
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    tail = (x.requires_grad_(),) if x.is_floating_point() else ()

    def forward(*arguments):
        weights, inputs = arguments[: len(names)], arguments[len(names) :] or (x,)
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), inputs)

    assert torch.autograd.gradcheck(forward, (*values, *tail))


@pytest.mark.parametrize("row", [row for row in LAYERS if row.matrix is not None], ids=lambda row: row.name)
def test_the_error_is_the_tail_of_the_singular_values(row):
    dense = row.dense("prime", dtype=torch.float64)
    weight = dense.weight.detach()
    values = torch.linalg.svdvals(row.matrix(weight))
    for rank in range(1, len(values) + 1):
        layer = row.from_dense(dense, rank=rank)
        tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert layer.rank == rank
        assert relative(layer.to_dense().weight, weight) == pytest.approx(tail, rel=1e-10, abs=1e-13)
        assert torch.allclose(layer.factors().s, values[:rank], rtol=1e-10)


@pytest.mark.parametrize(
    "row",
    [row for row in LAYERS if row.matrix is not None and row.balanced and not row.form],
    ids=lambda row: row.name,
)
def test_the_singular_values_stand_half_on_either_side(row):
    dense, layer = converted(row, dtype=torch.float64)
    expected = torch.linalg.svdvals(row.matrix(dense.weight.detach()))[: layer.rank].sqrt()
    for child in layer.children():
        weight = child.weight.detach()
        values = torch.linalg.svdvals(weight.flatten(1))
        assert torch.allclose(values, expected, rtol=1e-10)


@rows
def test_the_error_falls_with_the_rank_and_ends_at_zero(row):
    dense = row.dense(dtype=torch.float64)
    small = row.from_dense(dense, rank=row.small)
    full = row.from_dense(dense, rank=row.full_rank(dense))
    assert 1e-2 < relative(small.to_dense().weight, dense.weight) < 1
    assert relative(full.to_dense().weight, dense.weight) < 1e-6


@rows
def test_factors_are_the_dense_weight(row):
    for layer in (converted(row)[1], row.fresh()):
        factors = layer.factors()
        weight = layer.to_dense().weight
        assert isinstance(factors, lr.Factorization)
        assert relative(factors.to_dense().reshape(unfolded(row, weight).shape), unfolded(row, weight)) < TIGHT
        assert not factors.to_dense().requires_grad
        rank = factors.rank if isinstance(layer.rank, int) else factors.rank[:2]
        assert rank == layer.rank


@rows
def test_ranks_above_the_dimension_change_nothing(row):
    dense = row.dense()
    full = row.from_dense(dense, rank=row.full_rank(dense))
    above = row.from_dense(dense, rank=row.excess)
    assert above.rank == full.rank
    for name, parameter in full.named_parameters():
        assert torch.equal(above.get_parameter(name), parameter)
    for variant in row.variants:
        assert row.fresh(variant, rank=row.excess).rank == row.full_rank(row.dense(variant)), variant


@rows
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_are_recovered_at_the_small_rank(row, value):
    dense = row.dense()
    nn.init.constant_(dense.weight, value)
    layer = row.from_dense(dense, rank=row.small)
    assert torch.allclose(layer.to_dense().weight, dense.weight, rtol=TIGHT, atol=TIGHT)
    x = row.input(dense)
    assert torch.allclose(layer(x), dense(x), rtol=TIGHT, atol=TIGHT * row.input(dense).numel())


@rows
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60], ids=["tiny", "huge"])
def test_the_scale_of_the_weights_does_not_matter(row, scale):
    dense = row.dense(**({"bias": False} if hasattr(row.dense(), "bias") else {}))
    scaled = copy.deepcopy(dense)
    with torch.no_grad():
        scaled.weight.mul_(scale)
    small, large = (row.from_dense(d, rank=row.small).to_dense().weight for d in (dense, scaled))
    assert relative(large / scale, small) < TIGHT


@rows
def test_a_fresh_layer_has_the_output_variance_of_its_dense_twin(row):
    settings, rank = row.wide
    energies: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for seed in range(60):
            torch.manual_seed(seed)
            dense, factored = row.cls.dense_type(**settings), row.cls(**settings, **row.form, rank=rank)
            x = row.sample(dense, (8,))
            energies[True].append(float(dense(x).square().mean()))
            energies[False].append(float(factored(x).square().mean()))
    dense, factored = torch.tensor(energies[True]), torch.tensor(energies[False])
    spread = float((dense.var() + factored.var()).sqrt()) / 60**0.5
    assert spread < 0.06 * dense.mean()  # else the next line would prove nothing
    assert abs(float(dense.mean() - factored.mean())) < 3.5 * spread


@rows
def test_fresh_layers_differ_and_follow_the_seed(row):
    torch.manual_seed(3)
    first, second = row.fresh(), row.fresh()
    torch.manual_seed(3)
    again = row.fresh()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, second.get_parameter(name))


@rows
def test_two_flops_a_mac_is_what_torch_counts(row):
    for variant, settings in row.variants.items():
        if "max_norm" in settings:
            continue  # how many rows are renormalized, and so the work, depends on the data
        for layer in (row.dense(variant), row.fresh(variant)):
            dense = layer.to_dense() if isinstance(layer, lr.FactoredModule) else layer
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(row.input(dense, batch=3))
            cost = lr.layer_cost(layer, row.sample_shape(dense))
            assert 2 * 3 * cost.macs == counter.get_total_flops(), variant
            assert cost.params == sum(p.numel() for p in layer.parameters())
            assert cost.bytes == sum(t.numel() * t.element_size() for t in layer.state_dict().values())
