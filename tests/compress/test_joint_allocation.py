"""Layers together or by themselves under one budget: every limit is kept, and nothing is worse than without groups."""

import copy
import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.bundles import find_members, make_bundles
from lowrank_layers.compress.request import make_request
from lowrank_layers.rank.knapsack import allocate

METHODS = [lr.PivotMethod(), lr.HiddenUnitsMethod()]


def model_of(*sizes: int) -> nn.Module:
    """Perceptrons of one hidden layer each, one after the other."""
    parts = [nn.Sequential(nn.Linear(8, size), nn.Tanh(), nn.Linear(size, 8)) for size in sizes]
    return nn.Sequential(*parts).eval()


def calibrated(model: nn.Module, *, loss: bool = True) -> lr.Statistics:
    batches = [torch.randn(60, 8) for _ in range(4)]
    return lr.calibrate(model, batches, lr.SampledCrossEntropy() if loss else None)


def test_the_choice_is_the_best_one_over_all_sets_of_groups():
    model = model_of(12, 20, 16)
    stats = calibrated(model)
    request = make_request(METHODS, stats, None, None, 1)
    layers = {name: request.candidate(each, stats[name]) for name, each in model.named_modules() if name in stats}
    single = {name: _options(layer) for name, layer in layers.items()}
    members = find_members(model, request, layers, layers, uniform=False)
    bundles = make_bundles(model, members, request, None, {}, uniform=False)
    assert len(bundles) == 5  # those between two perceptrons too
    together = []
    for bundle in bundles:
        options = [(sum(layers[name].before.params for name in bundle.planned), 0.0)]
        for costs, (loss,) in zip(bundle.costs, bundle.losses, strict=True):
            options.append((sum(cost.params for cost in costs.values()), loss))
        together.append(options)
    for share in (0.9, 0.7, 0.5, 0.3):
        limit, losses = int(share * sum(p.numel() for p in model.parameters())), []
        for chosen in map(set, _subsets(range(5))):
            inside = [name for k in chosen for name in bundles[k].planned]
            if len(inside) > len(set(inside)):
                continue
            options = [single[name] for name in layers if name not in inside] + [together[k] for k in chosen]
            sizes, sums = ([[each[k] for each in layer] for layer in options] for k in (0, 1))
            picks = allocate(sizes, sums, limit)
            losses.append(sum(layer[pick] for layer, pick in zip(sums, picks, strict=True)))
        found = lr.make_plan(model, lr.Budget(params=limit), stats, METHODS, units="absolute")
        assert min(losses) * (1 - 1e-9) <= found.loss <= min(1.02 * min(losses), losses[0] * (1 + 1e-9))


def _subsets(values: Iterable[int]) -> Iterator[tuple[int, ...]]:
    known = list(values)
    return itertools.chain.from_iterable(itertools.combinations(known, size) for size in range(len(known) + 1))


def _options(layer: lr.Candidate) -> list[tuple[int, float]]:
    """Sizes and losses of a layer by itself, dense first."""
    options = lr.PivotMethod().options(layer)
    return [(layer.before.params, 0.0), *((option.cost.params, option.loss_increase) for option in options)]


@pytest.mark.parametrize("effect", [1e4, 1e-4])
def test_what_all_effects_have_in_common_changes_no_choice_between_layers_and_groups(effect):
    torch.manual_seed(0)
    model = model_of(6, 6, 30)
    stats = calibrated(model)
    plain = lr.make_plan(model, lr.Budget(params=0.3), stats, METHODS)
    plan = lr.make_plan(model, lr.Budget(params=0.3), stats, METHODS, effects=dict.fromkeys(stats, effect))
    assert {"pivot", "hidden_units"} <= {entry.method for entry in plain}
    assert [(entry.method, entry.rank) for entry in plan] == [(entry.method, entry.rank) for entry in plain]
    assert plan.loss == pytest.approx(effect * plain.loss, rel=1e-9)


@pytest.mark.parametrize(
    "budget",
    [
        lr.Budget(params=0.5),
        lr.Budget(bytes=0.5, macs=0.6),
        lr.Budget(params=0.5, of="planned"),
        lr.Budget(loss=0.02),
        lr.Budget(params=0.9, loss=0.02),
    ],
)
@pytest.mark.parametrize("units", ["absolute", "balanced", "relative", "trimmed"])
def test_every_limit_is_kept(budget, units):
    model = model_of(12, 20, 16)
    plan = lr.make_plan(model, budget, calibrated(model), METHODS, units=units)
    for limit, have in plan.achieved().values():
        assert have <= limit * (1 + 1e-9)
    assert any(entry.is_grouped for entry in plan) or budget.loss is not None


def test_statistics_without_a_loss_will_do():
    model = model_of(12, 20)
    stats = calibrated(model, loss=False)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, METHODS)
    assert plan.settings["units"] == "trimmed"
    small = lr.factorize_(copy.deepcopy(model), plan, stats)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params


def test_numbers_of_units_are_rounded_as_ranks_are():
    model = model_of(64, 64)
    plan = lr.make_plan(model, lr.Budget(params=0.5), calibrated(model), METHODS[1:], round_to=8)
    assert {entry.rank % 8 for entry in plan if entry.is_grouped} == {0}


def test_projections_of_a_closed_attention_are_no_group():
    """Its single head could lose entries of its values, but no layer of torch is that small attention."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

        def forward(self, x):
            return x + self.mlp(x + self.attention(x, x, x, need_weights=False)[0])

    model, batches = Model().eval(), [torch.randn(8, 6, 8) for _ in range(4)]
    stats = lr.calibrate(model, batches, lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats, METHODS[1:])
    assert {entry.name for entry in plan if entry.is_grouped} == {"mlp.0", "mlp.2"}
    lr.factorize_(model, plan, stats, batches)
    assert sum(p.numel() for p in model.parameters()) == plan.after.params
