"""ALDS: the least of the largest relative error in the spectral norm."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr


def planted(rank: int, seed: int, tail: float = 0.01) -> nn.Linear:
    """A layer with that many equal singular values, and others of ``tail`` times their size."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=g)).Q for _ in range(2))
    values = torch.full((40,), tail)
    values[:rank] = 1
    layer = nn.Linear(40, 40)
    with torch.no_grad():
        layer.weight.copy_(left * values @ right)
    return layer


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
def test_one_threshold_holds_for_all_layers_and_a_lower_one_costs_too_much(fraction):
    model = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
    plan = lr.make_plan(model, lr.Budget(params=fraction, of="planned"), allocation="alds")
    spectra = {entry.name: torch.linalg.svdvals(model[int(entry.name)].weight.detach().double()) for entry in plan}

    def error(name: str, rank: int | None) -> float:
        s = spectra[name]
        return 0.0 if rank is None or rank == len(s) else float(s[rank] / s[0])

    worst = max(error(entry.name, entry.rank) for entry in plan)
    assert sum(entry.after.params for entry in plan) <= fraction * sum(entry.before.params for entry in plan)
    # with a threshold below the one reached, the cheapest ranks of all layers do not fit
    size = 0
    for entry in plan:
        out, in_ = model[int(entry.name)].weight.shape
        rank = next(r for r in range(1, min(out, in_) + 1) if error(entry.name, r) < worst * (1 - 1e-6))
        size += min(rank * (out + in_) + out, entry.before.params)
    assert size > fraction * sum(entry.before.params for entry in plan)


def test_planted_ranks_are_recovered():
    """Ranks 3 and 9, in a tail of a hundredth: with room for both and a little more, no layer loses a large value."""
    model = nn.Sequential(planted(3, 0), nn.ReLU(), planted(9, 1))
    plan = lr.make_plan(model, lr.Budget(params=12 * 80 + 80), allocation="alds")
    assert [entry.rank for entry in plan] == [3, 9]


def test_the_scale_of_a_layer_does_not_matter():
    model = nn.Sequential(planted(3, 0), nn.ReLU(), planted(9, 1))
    with torch.no_grad():
        model[2].weight.mul_(1000)
    assert [e.rank for e in lr.make_plan(model, lr.Budget(params=12 * 80 + 80), allocation="alds")] == [3, 9]


def test_it_looks_at_the_weighted_matrix():
    """Inputs that live in two dimensions leave two singular values of any weight."""
    model = nn.Sequential(nn.Linear(40, 40))
    inputs = torch.randn(300, 2) @ torch.randn(2, 40)
    stats = lr.calibrate(model, [inputs])
    plan = lr.make_plan(model, lr.Budget(params=2 * 80 + 40), stats=stats, allocation="alds")
    assert [entry.rank for entry in plan] == [2]
    assert plan["0"].error < 0.1


def test_the_plan_says_how_it_was_made(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    plan = lr.make_plan(model, lr.Budget(params=0.5), allocation="alds")
    assert plan.settings["allocation"] == "alds"
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"allocation": "greedy"}, "got allocation 'greedy', expected 'knapsack' or 'alds'"),
        ({"units": "absolute"}, "got allocation='alds' with rank= or units="),
        ({"methods": [lr.TuckerMethod()]}, r"got allocation='alds' with methods=.*expected \[SVDMethod\(\)\]"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, text):
    with pytest.raises(lr.LowRankError, match=f"^make_plan: {text}"):
        lr.make_plan(nn.Sequential(nn.Linear(40, 40)), lr.Budget(params=0.5), **{"allocation": "alds", **options})
