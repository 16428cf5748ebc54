"""The exact choice of one option per layer under a budget: the multiple-choice knapsack problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import BudgetError

_MOVES = 1024
"""Changes of one layer, those that lose least at the price of the relaxation, that are tried in pairs."""
_ROUNDS = 200
"""Changes after each other, at most."""


@dataclass(frozen=True)
class _Frontier:
    """Pareto-optimal options of one layer: costs rising, losses falling, indices of the caller."""

    costs: Tensor
    losses: Tensor
    index: Tensor


@dataclass(frozen=True)
class _Edges:
    """Edges of the lower convex hulls of several layers, steepest first: one tensor entry per edge.

    Args:
        extra: cost that an edge adds.
        gain: loss that it saves.
        layer: position of its layer.
        reached: position on the layer's frontier at which it ends.
    """

    extra: Tensor
    gain: Tensor
    layer: Tensor
    reached: Tensor


def allocate(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Picks one option per layer with the least total loss whose total cost is at most ``capacity``.

    The choice is exact. The linear relaxation (each layer's lower convex hull, steepest descents first) gives a price,
    a bound and a feasible choice. Options whose reduced cost exceeds the gap between the two cannot be part of a better
    one and are dropped (Sinha and Zoltners, 1979); changes of two layers at a time make the choice better before, and
    so the gap smaller. What is left is solved by merging Pareto frontiers layer by layer,
    each state pruned by the relaxation of the layers that follow.

    Args:
        costs: for each layer, the cost of each option, an integer.
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
    frontiers = [_frontier(c, v) for c, v in zip(costs, losses, strict=True)]
    least = sum(int(frontier.costs[0]) for frontier in frontiers)
    if least > capacity:
        raise BudgetError(f"the smallest options cost {least:,} together, but only {capacity:,} are left for them.")
    if not frontiers:
        return []
    price, picks = _relax(frontiers, capacity)
    picks = _improved(frontiers, picks, price, capacity)
    incumbent = sum(float(frontier.losses[k]) for frontier, k in zip(frontiers, picks, strict=True))
    bound = sum(float((f.losses + price * f.costs).min()) for f in frontiers) - price * capacity
    # rounding must not cut the incumbent itself away
    slack = 1e-9 * (incumbent + price * capacity) + 1e-300
    frontiers = [_drop(frontier, price, incumbent - bound + slack) for frontier in frontiers]
    return _merge(frontiers, capacity, incumbent + slack)


def _frontier(costs: Sequence[float], losses: Sequence[float]) -> _Frontier:
    c = torch.tensor(costs, dtype=torch.float64)
    v = torch.tensor(losses, dtype=torch.float64)
    order = _undominated(c, v)
    return _Frontier(c[order], v[order], order)


def _undominated(costs: Tensor, losses: Tensor) -> Tensor:
    """Positions of the options that no other one beats in both cost and loss, the cheapest first."""
    order = losses.argsort(stable=True)
    order = order[costs[order].argsort(stable=True)]
    sorted_losses = losses[order]
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = sorted_losses[1:] < sorted_losses.cummin(0).values[:-1]
    return order[better]


def _hull(costs: list[float], losses: list[float]) -> list[int]:
    """Positions on the lower convex hull."""
    hull: list[int] = []
    for k, (x, y) in enumerate(zip(costs, losses, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (losses[b] - losses[a]) * (x - costs[a]) < (y - losses[a]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _edges(frontiers: Sequence[_Frontier]) -> _Edges:
    edges = []
    for layer, frontier in enumerate(frontiers):
        costs, losses = frontier.costs.tolist(), frontier.losses.tolist()
        edges += [(costs[b] - costs[a], losses[a] - losses[b], layer, b) for a, b in pairwise(_hull(costs, losses))]
    edges.sort(key=lambda edge: -edge[1] / edge[0])
    extra, gain, layers, reached = zip(*edges, strict=True) if edges else ((), (), (), ())
    return _Edges(
        torch.tensor(extra, dtype=torch.float64),
        torch.tensor(gain, dtype=torch.float64),
        torch.tensor(layers, dtype=torch.int64),
        torch.tensor(reached, dtype=torch.int64),
    )


def _relax(frontiers: Sequence[_Frontier], capacity: int) -> tuple[float, list[int]]:
    """The price at which the relaxation breaks, and a feasible choice: every hull edge that still fits."""
    edges = _edges(frontiers)
    picks = [0] * len(frontiers)
    left = capacity - sum(float(frontier.costs[0]) for frontier in frontiers)
    price, blocked = 0.0, set()
    columns = (edges.extra.tolist(), edges.gain.tolist(), edges.layer.tolist(), edges.reached.tolist())
    for extra, gain, layer, position in zip(*columns, strict=True):
        if layer in blocked:
            continue
        if extra <= left:
            left -= extra
            picks[layer] = position
        else:
            price = price or gain / extra
            blocked.add(layer)
    return price, picks


def _improved(frontiers: Sequence[_Frontier], picks: list[int], price: float, capacity: int) -> list[int]:
    """The choice after the best changes of one or two layers, one after the other, as long as there are any."""
    counts = torch.tensor([len(frontier.costs) for frontier in frontiers])
    layer = torch.arange(len(frontiers)).repeat_interleave(counts)
    option = torch.cat([torch.arange(count) for count in counts.tolist()])
    costs = torch.cat([frontier.costs for frontier in frontiers])
    losses = torch.cat([frontier.losses for frontier in frontiers])
    first, chosen = counts.cumsum(0) - counts, torch.tensor(picks)
    for _ in range(_ROUNDS):
        own = (first + chosen)[layer]
        extra, lost = costs - costs[own], losses - losses[own]
        near = (lost + price * extra).argsort()[:_MOVES]  # among these are the options that were chosen
        a, b = extra[near], lost[near]
        left = capacity - costs[first + chosen].sum()
        allowed = (a[:, None] + a <= left) & ((layer[near][:, None] != layer[near]) | ((a == 0) & (b == 0)))
        sums = torch.where(allowed, b[:, None] + b, 0.0)
        if not sums.min() < -1e-12 * losses[first + chosen].sum():
            break
        for move in divmod(int(sums.argmin()), len(near)):
            if a[move] or b[move]:
                chosen[layer[near[move]]] = option[near[move]]
    return [int(pick) for pick in chosen]


def _drop(frontier: _Frontier, price: float, gap: float) -> _Frontier:
    reduced = frontier.losses + price * frontier.costs
    keep = reduced - reduced.min() <= gap
    return _Frontier(frontier.costs[keep], frontier.losses[keep], frontier.index[keep])


def _merge(frontiers: Sequence[_Frontier], capacity: int, best: float) -> list[int]:
    cost = torch.zeros(1, dtype=torch.float64)
    loss = torch.zeros(1, dtype=torch.float64)
    edges = _edges(frontiers)
    firsts = torch.stack([torch.stack([frontier.costs[0], frontier.losses[0]]) for frontier in frontiers])
    rest = firsts.sum(0) - firsts.cumsum(0)  # the cheapest options of the layers that follow
    history: list[tuple[Tensor, Tensor]] = []
    for layer, frontier in enumerate(frontiers):
        c = (cost[:, None] + frontier.costs[None]).flatten()
        v = (loss[:, None] + frontier.losses[None]).flatten()
        later = edges.layer > layer
        corners = torch.cat([rest[layer, :1], edges.extra[later]]).cumsum(0)
        relaxed = torch.cat([rest[layer, 1:], -edges.gain[later]]).cumsum(0)
        alive = (v + _bound(corners, relaxed, capacity - c) <= best).nonzero().flatten()
        order = alive[_undominated(c[alive], v[alive])]
        cost, loss = c[order], v[order]
        history.append((order // len(frontier.costs), frontier.index[order % len(frontier.costs)]))
    state, picks = int(loss.argmin()), []
    for parent, choice in reversed(history):
        picks.append(int(choice[state]))
        state = int(parent[state])
    return picks[::-1]


def _bound(costs: Tensor, losses: Tensor, left: Tensor) -> Tensor:
    """The relaxation's loss for every amount of capacity left; infinite where nothing fits.

    Args:
        costs: corners of the relaxation's curve, rising.
        losses: its values there, falling.
        left: the amounts.
    """
    if len(costs) == 1:
        found = losses.expand_as(left)
    else:
        right = torch.searchsorted(costs, left).clamp(1, len(costs) - 1)
        part = ((left - costs[right - 1]) / (costs[right] - costs[right - 1])).clamp(0, 1)
        found = losses[right - 1] + part * (losses[right] - losses[right - 1])
    return torch.where(left < costs[0], torch.inf, found)
