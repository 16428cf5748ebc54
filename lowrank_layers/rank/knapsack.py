"""The exact choice of one option a layer under a budget (the multiple-choice knapsack problem)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import BudgetError


@dataclass(frozen=True)
class _Front:
    """Pareto-optimal options of one layer: costs rising, losses falling, indices of the caller."""

    costs: Tensor
    losses: Tensor
    index: Tensor


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Picks one option a layer with the least total loss whose total cost is at most ``capacity``.

    Exact. The linear relaxation (each layer's lower convex hull, steepest descents first) gives a price, a bound and
    a feasible choice; options whose reduced cost exceeds the gap between the two cannot be part of a better one and
    are dropped (Sinha and Zoltners, 1979); what is left is solved by merging Pareto fronts layer by layer, each state
    pruned by the relaxation of the layers that follow.

    Args:
        costs: for each layer, the cost of each option.
        losses: for each layer, the loss of each option.
        capacity: the limit on the sum of costs.

    Returns:
        The index of the chosen option of each layer.

    Raises:
        BudgetError: if even the cheapest options exceed the capacity.

    Examples:
        >>> allocate([[1, 5], [2, 6]], [[3.0, 0.0], [10.0, 0.0]], capacity=7)
        [0, 1]
    """
    fronts = [_front(c, v) for c, v in zip(costs, losses, strict=True)]
    least = sum(int(front.costs[0]) for front in fronts)
    if least > capacity:
        raise BudgetError(f"the smallest options cost {least:,} together, but only {capacity:,} are left for them.")
    if not fronts:
        return []
    price, picks = _relax(fronts, capacity)
    incumbent = _total(fronts, picks)
    bound = sum(float((f.losses + price * f.costs).min()) for f in fronts) - price * capacity
    # rounding must not cut the incumbent itself away
    slack = 1e-9 * (incumbent + price * capacity) + 1e-300
    fronts = [_drop(front, price, incumbent - bound + slack) for front in fronts]
    return _merge(fronts, capacity, incumbent + slack)


def _front(costs: Sequence[int], losses: Sequence[float]) -> _Front:
    c = torch.tensor(costs, dtype=torch.float64)
    v = torch.tensor(losses, dtype=torch.float64)
    order = v.argsort(stable=True)
    order = order[c[order].argsort(stable=True)]
    c, v = c[order], v[order]
    better = torch.ones(len(v), dtype=torch.bool)
    better[1:] = v[1:] < v.cummin(0).values[:-1]
    return _Front(c[better], v[better], order[better])


def _hull(front: _Front) -> list[int]:
    """Positions on the lower convex hull."""
    hull: list[int] = []
    points = list(zip(front.costs.tolist(), front.losses.tolist(), strict=True))
    for k, (x, y) in enumerate(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(k)
    return hull


def _steps(fronts: Sequence[_Front]) -> list[tuple[float, float, float, int, int]]:
    """All hull edges, steepest first: (slope, extra cost, gained loss, layer, position reached)."""
    steps = []
    for layer, front in enumerate(fronts):
        hull = _hull(front)
        for a, b in pairwise(hull):
            extra = float(front.costs[b] - front.costs[a])
            gain = float(front.losses[a] - front.losses[b])
            steps.append((-gain / extra, extra, gain, layer, b))
    return sorted(steps, key=lambda step: step[0])


def _relax(fronts: Sequence[_Front], capacity: int) -> tuple[float, list[int]]:
    """The price at which the relaxation breaks, and a feasible choice: every hull step that still fits."""
    picks = [0] * len(fronts)
    left = capacity - sum(float(front.costs[0]) for front in fronts)
    price, blocked = 0.0, set()
    for slope, extra, _, layer, position in _steps(fronts):
        if layer in blocked:
            continue
        if extra <= left:
            left -= extra
            picks[layer] = position
        else:
            price = price or -slope
            blocked.add(layer)
    return price, picks


def _total(fronts: Sequence[_Front], picks: Sequence[int]) -> float:
    return sum(float(front.losses[k]) for front, k in zip(fronts, picks, strict=True))


def _drop(front: _Front, price: float, gap: float) -> _Front:
    reduced = front.losses + price * front.costs
    keep = reduced - reduced.min() <= gap
    return _Front(front.costs[keep], front.losses[keep], front.index[keep])


def _merge(fronts: Sequence[_Front], capacity: int, best: float) -> list[int]:
    cost = torch.zeros(1, dtype=torch.float64)
    loss = torch.zeros(1, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []
    for layer, front in enumerate(fronts):
        rest = fronts[layer + 1 :]
        c = (cost[:, None] + front.costs[None]).flatten()
        v = (loss[:, None] + front.losses[None]).flatten()
        parent = torch.arange(len(cost)).repeat_interleave(len(front.costs))
        choice = front.index.repeat(len(cost))
        alive = (v + _bound(rest, capacity - c) <= best).nonzero().flatten()
        order = alive[v[alive].argsort(stable=True)]
        order = order[c[order].argsort(stable=True)]
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = v[order][1:] < v[order].cummin(0).values[:-1]
        order = order[better]
        cost, loss = c[order], v[order]
        history.append((parent[order], choice[order]))
    state, picks = int(loss.argmin()), []
    for parent, choice in reversed(history):
        picks.append(int(choice[state]))
        state = int(parent[state])
    return picks[::-1]


def _bound(fronts: Sequence[_Front], left: Tensor) -> Tensor:
    """The relaxation's value for every amount of capacity left; infinite where nothing fits."""
    cost = sum(float(front.costs[0]) for front in fronts)
    value = sum(float(front.losses[0]) for front in fronts)
    steps = _steps(fronts)
    costs = torch.tensor([cost] + [step[1] for step in steps], dtype=torch.float64).cumsum(0)
    values = torch.tensor([value] + [-step[2] for step in steps], dtype=torch.float64).cumsum(0)
    right = torch.searchsorted(costs, left).clamp(1, len(costs)) if len(costs) > 1 else torch.ones_like(left).long()
    if len(costs) == 1:
        result = values[0].expand_as(left)
    else:
        right = right.clamp(max=len(costs) - 1)
        part = ((left - costs[right - 1]) / (costs[right] - costs[right - 1])).clamp(0, 1)
        result = values[right - 1] + part * (values[right] - values[right - 1])
    return torch.where(left < cost, torch.inf, result)
