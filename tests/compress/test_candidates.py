"""Everything about one layer is computed once while a plan is made, and little of it is kept."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

import lowrank_layers as lr


@pytest.fixture
def model() -> nn.Module:
    parts = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    return nn.Sequential(*parts)


@pytest.fixture
def stats(model) -> lr.Statistics:
    return lr.calibrate(model, [torch.randn(40, 3, 8, 8)], loss=lr.SampledCrossEntropy())


class CountedStats(lr.LayerStats):
    """Statistics that note how often they are read."""

    reads: ClassVar[list[int]] = []

    def group(self, index: int) -> lr.LayerStats:
        self.reads.append(id(self))
        return super().group(index)


class CountedPrices(lr.CountedCost):
    """Prices that note what was priced."""

    priced: ClassVar[list[object]] = []

    def cost(self, layer: nn.Module, stats: lr.LayerStats | None) -> lr.Cost:
        factored = isinstance(layer, lr.FactoredModule)
        self.priced.append((id(stats), type(layer), layer.rank, str(layer.form)) if factored else layer)
        return super().cost(layer, stats)


def test_a_layer_is_weighted_once_and_every_rank_priced_once(model, stats):
    """All methods compete, and the units and the errors of the plan ask for the energies again."""
    CountedStats.reads.clear()
    CountedPrices.priced.clear()
    known = lr.Statistics({name: CountedStats(**vars(each)) for name, each in stats.items()}, samples=stats.samples)
    methods = list(lr.METHODS.values())
    settings = {"units": "trimmed", "methods": methods, "cost_model": CountedPrices()}
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=known, **settings)
    assert plan == lr.make_plan(model, lr.Budget(params=0.5), stats=stats, units="trimmed", methods=methods)
    assert len(CountedStats.reads) == len(set(CountedStats.reads)) == 3
    assert len(CountedPrices.priced) == len(set(CountedPrices.priced)) > 3


def test_what_is_cached_for_all_layers_at_once_is_small(model, stats):
    layer = lr.Candidate(model[4], stats["4"])
    energy, tails = layer.energy, layer.tails
    assert "problems" in vars(layer)
    layer.release()
    assert "problems" not in vars(layer)
    assert sum(values.numel() for values in tails) == 11
    assert (layer.energy, layer.tails) == (energy, tails)
    assert layer.problems[0].energy == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (20, 6), (7, 7)])
@pytest.mark.parametrize("known", ["nothing", "inputs", "gradients"])
def test_the_spectrum_is_that_of_the_weighted_matrix(rows, columns, known):
    """The Gram matrix of the smaller side, made without the other side's root, against LAPACK's singular values."""
    layer = nn.Linear(columns, rows)
    stats = None
    if known != "nothing":
        loss = lr.SampledCrossEntropy() if known == "gradients" else None
        x = torch.randn(100, columns) @ torch.randn(columns, columns) + 1
        stats = lr.calibrate(nn.Sequential(layer, nn.ReLU(), nn.Linear(rows, 4)), [x], loss=loss)["0"]
    (problem,) = lr.Candidate(layer, stats).problems
    expected = torch.linalg.svdvals(problem.matrix)
    assert torch.allclose(problem.singular_values, expected, rtol=1e-6, atol=1e-7 * float(expected[0]))
    assert problem.energy == pytest.approx(0.5 * problem.scale * float(expected.square().sum()), rel=1e-10)
    assert float(problem.tails[0]) == pytest.approx(problem.energy, rel=1e-10)


def test_statistics_of_another_model_are_refused():
    stats = lr.calibrate(nn.Sequential(nn.Linear(6, 4)), [torch.randn(10, 6)])["0"]
    with pytest.raises(lr.LowRankError, match="got statistics of 6 inputs for a layer of 5"):
        lr.Candidate(nn.Linear(5, 4), stats).problems  # noqa: B018


def test_the_symmetric_weighted_matrix_is_that_of_symmetric_roots():
    """``G^(1/2) W X^(1/2)`` by eigenvalues; its singular values are those of any other roots."""
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    stats = lr.calibrate(model, [torch.randn(60, 12) @ torch.randn(12, 12)], loss=lr.SampledCrossEntropy())
    (problem,) = lr.Candidate(model[0], stats["0"]).problems
    roots = []
    for metric in (problem.outputs, problem.inputs):
        values, vectors = torch.linalg.eigh(metric.matrix)
        roots.append(vectors * values.sqrt() @ vectors.mT)
    torch.testing.assert_close(problem.symmetric_matrix, roots[0] @ problem.weight @ roots[1])
    torch.testing.assert_close(torch.linalg.svdvals(problem.symmetric_matrix), problem.singular_values)
