"""Every rank rule that looks at factorizations of several ranks: planted ranks, refusals, and where it is taken."""

import dataclasses

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .tables import REFIT_RULES, generator, spectrum_of

rows = pytest.mark.parametrize("row", REFIT_RULES, ids=lambda row: row.name)


@pytest.mark.parametrize(
    ("row", "rank"),
    [(row, rank) for row in REFIT_RULES for rank in row.ranks],
    ids=[f"{row.name}-{rank}" for row in REFIT_RULES for rank in row.ranks],
)
def test_a_planted_rank_is_recovered(row, rank):
    assert row.decompose(row.planted(rank, 0), row.rule).rank == rank


@rows
def test_it_looks_and_does_not_touch(row):
    tensor = row.planted(row.ranks[0], 1)
    before, state = tensor.clone(), torch.get_rng_state()
    assert row.decompose(tensor, row.rule).rank == row.decompose(tensor, row.rule).rank
    assert torch.equal(tensor, before)
    assert torch.equal(torch.get_rng_state(), state)


@rows
def test_the_factors_are_those_of_the_integer(row):
    tensor = row.planted(row.ranks[0], 0)
    assert torch.equal(row.decompose(tensor, row.rule).to_dense(), row.decompose(tensor, row.ranks[0]).to_dense())


@rows
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60], ids=str)
def test_units_do_not_matter(row, scale):
    assert row.decompose(row.planted(row.ranks[-1], 0) * scale, row.rule).rank == row.ranks[-1]


@rows
def test_only_ranks_that_are_asked_for_are_chosen(row):
    rule = dataclasses.replace(row.rule, ranks=(2,))
    assert row.decompose(row.planted(row.ranks[0], 0), rule).rank in (1, 2)


@rows
def test_the_largest_rank_of_use_is_never_tried(row):
    """It is exact for any tensor, and so as stable and consistent as can be."""
    tensor = torch.rand(3, 3, generator=generator(0)) + 0.1
    assert row.decompose(tensor, dataclasses.replace(row.rule, ranks=(3, 4))).rank < 3


@rows
def test_where_nothing_is_fitted_it_is_refused_with_the_remedy(row):
    with pytest.raises(lr.LowRankError, match=r"^test: got .*no single tensor is factorized.*ParameterFraction"):
        row.rule(spectrum_of(None, (4, 5)))
    with pytest.raises(lr.LowRankError, match=r"^tucker: got .*no single tensor"):
        lr.tucker(torch.randn(5, 4, 3), row.rule)
    with pytest.raises(lr.LowRankError, match=r"^LowRankLinear: got .*no single tensor"):
        lr.LowRankLinear(20, 10, rank=row.rule)


@pytest.mark.parametrize("row", [row for row in REFIT_RULES if row.refused], ids=lambda row: row.name)
def test_factors_that_it_cannot_read_are_refused(row):
    name = row.refused.__name__
    with pytest.raises(lr.LowRankError, match=rf"^{name}: got {type(row.rule).__name__}.*give it to"):
        row.refused(torch.rand(9, 8, generator=generator(0)), row.rule)


@rows
@pytest.mark.parametrize("ranks", [(), (0,), (1, 2.0), 3, None], ids=repr)
def test_bad_ranks_are_refused(row, ranks):
    with pytest.raises(lr.LowRankError, match=rf"^{type(row.rule).__name__}: got ranks=.*expected integers"):
        dataclasses.replace(row.rule, ranks=ranks)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: lr.CrossValidation(folds=1), "CrossValidation: got folds=1"),
        (lambda: lr.CrossValidation(score=0.5), r"CrossValidation: got score=0\.5"),
        (lambda: lr.FactorMatch(restarts=1), "FactorMatch: got restarts=1"),
        (lambda: lr.FactorMatch(least="a"), "FactorMatch: got least='a'"),
        (lambda: lr.ConsensusStability(measure="gap"), "ConsensusStability: got measure 'gap'"),
        (lambda: lr.ConsensusStability(restarts=1), "ConsensusStability: got restarts=1"),
        (lambda: lr.ConsensusStability(least=float("nan")), "ConsensusStability: got least=nan"),
        (lambda: lr.CORCONDIA(least=None), "CORCONDIA: got least=None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_are_refused(build, text):
    with pytest.raises(lr.LowRankError, match=f"^{text}, expected"):
        build()


# ------------------------------------------------------------------------------------------------ where it is taken


def test_layers_take_cross_validation():
    matrix = REFIT_RULES[0].planted(3, 0)
    linear, conv = nn.Linear(30, 40), nn.Conv2d(5, 40, (2, 3))
    with torch.no_grad():
        linear.weight.copy_(matrix)
        conv.weight.copy_(matrix.reshape(conv.weight.shape))
    rule = lr.CrossValidation(ranks=range(1, 7))
    assert lr.LowRankLinear.from_dense(linear, rank=rule).rank == 3
    assert lr.LowRankConv2d.from_dense(conv, rank=rule).rank == 3


@pytest.mark.parametrize("rule", [lr.FactorMatch(ranks=range(1, 6)), lr.CORCONDIA(ranks=range(1, 6))], ids=str)
def test_cp_convolutions_take_rules_on_components(rule):
    g = generator(0)
    kernel = lr.CP(torch.ones(3), tuple(torch.randn(n, 3, generator=g) for n in (12, 10, 5, 3))).to_dense()
    conv = nn.Conv2d(10, 12, (5, 3))
    with torch.no_grad():
        conv.weight.copy_(kernel + 1e-3 * torch.randn(kernel.shape, generator=g))
    assert lr.CPConv2d.from_dense(conv, rank=rule).rank == 3
    plan = lr.make_plan(nn.Sequential(conv), rank=rule, methods=[lr.CPMethod()])
    assert [entry.rank for entry in plan] == [3]
    with pytest.raises(lr.LowRankError, match=r"^CPConv2d: got .*no single tensor"):
        lr.CPConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=2), rank=rule)


def test_plans_cross_validate_the_weighted_matrix():
    """Inputs live in 3 of 30 dimensions, so that a weight of full rank is a map of rank 3 where it is used."""
    g = generator(0)
    model = nn.Sequential(nn.Linear(30, 40, bias=False))
    inputs = torch.randn(200, 3, generator=g) @ torch.randn(3, 30, generator=g)
    stats = lr.calibrate(model, [inputs + 1e-3 * torch.randn(200, 30, generator=g)])
    rule = lr.CrossValidation(ranks=range(1, 7))
    assert [entry.rank for entry in lr.make_plan(model, rank=rule, stats=stats)] == [3]


def test_a_score_chooses_the_rank_after_which_nothing_is_gained():
    """Folds differ, and beyond rank 3 the score moves by less than its standard error over them."""
    asked = []

    def score(found: lr.Factorization, fold: int) -> float:
        rank = found.rank
        asked.append((rank, fold))
        return min(rank, 3) + (0.01 * (-1) ** fold if rank == 5 else 0.0) + fold

    assert lr.svd(torch.randn(20, 15), lr.CrossValidation(folds=4, ranks=range(1, 7), score=score)).rank == 3
    assert asked == [(rank, fold) for rank in range(1, 7) for fold in range(4)]


@pytest.mark.parametrize("answer", [None, "1", float("nan"), float("inf")], ids=repr)
def test_a_score_that_is_no_number_is_refused(answer):
    with pytest.raises(lr.LowRankError, match=r"^svd: the score of CrossValidation returned .*expected finite"):
        lr.svd(torch.randn(6, 5), lr.CrossValidation(score=lambda found, fold: answer))


def test_entries_of_sparse_matrices_are_not_held_out():
    """A score is computed from the factorization alone, so that it may be of a sparse matrix."""
    matrix = torch.eye(12).to_sparse()
    with pytest.raises(lr.LowRankError, match=r"^nmf: .*sparse matrix; give CrossValidation a score"):
        lr.nmf(matrix, lr.CrossValidation())
    rule = lr.CrossValidation(score=lambda found, fold: -abs(found.rank - 4))
    assert lr.nmf(matrix, rule).rank == 4


def test_one_entry_per_fold_is_needed():
    with pytest.raises(lr.LowRankError, match=r"^svd: .* for 4 entries, expected at least one per fold"):
        lr.svd(torch.rand(2, 2), lr.CrossValidation(folds=5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_entries_are_held_out_in_any_precision(dtype):
    matrix = REFIT_RULES[0].planted(3, 0).to(dtype)
    assert lr.svd(matrix, lr.CrossValidation(ranks=range(1, 6))).rank == 3
