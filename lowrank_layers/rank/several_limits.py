"""The choice of one option per layer under several limits: the multiple-choice knapsack problem in several units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BudgetError
from .knapsack import allocate

_STEPS = 24
"""Weights of the limits that are tried."""
_UNIT = 2**40
"""Integers into which a whole limit is divided where costs are none: their sums have no rounding."""


def allocate_within(
    costs: Sequence[Sequence[Sequence[float]]], losses: Sequence[Sequence[float]], capacities: Sequence[float]
) -> list[int]:
    """Picks one option per layer with little total loss whose total cost is within every capacity.

    Where the best choice under one of the limits keeps the others, it is the best under all. Otherwise the limits are
    added up with weights, which relaxes the problem to one limit (the surrogate relaxation of Glover, 1968) that is
    solved exactly. A limit that this choice exceeds gains weight. The best choice that keeps all limits is filled up:
    as long as a better option of some layer fits, the one that gains most for its cost is taken.

    Args:
        costs: for each limit, for each layer, the cost of each option.
        losses: for each layer, the loss of each option.
        capacities: the limits on the sums of costs.

    Returns:
        The index of the chosen option of each layer.

    Raises:
        BudgetError: if no choice within all capacities is found.

    Examples:
        >>> from lowrank_layers.rank.several_limits import allocate_within
        >>> allocate_within([[[1, 5], [2, 6]], [[1, 9], [2, 9]]], [[3.0, 0.0], [9.0, 0.0]], capacities=[11, 10])
        [0, 1]
    """
    if len(costs) == 1 and isinstance(capacities[0], int):
        return allocate(costs[0], losses, capacities[0])
    binding = [k for k, one in enumerate(costs) if sum(map(max, one)) > capacities[k]]
    if not binding:
        return [min(range(len(layer)), key=layer.__getitem__) for layer in losses]
    costs, capacities = [costs[k] for k in binding], [capacities[k] for k in binding]
    if min(capacities) <= 0:
        raise BudgetError("the layers that stay as they are leave nothing of a limit to the others.")
    sizes = torch.tensor(capacities, dtype=torch.float64)[:, None]
    shares = [torch.tensor(layer, dtype=torch.float64) / sizes for layer in zip(*costs, strict=True)]
    for k, capacity in enumerate(capacities):
        if isinstance(capacity, int):
            picks = allocate(costs[k], losses, capacity)
        else:
            picks = _allocate([share[k] for share in shares], losses, 1 - len(losses) / _UNIT)
        if len(costs) == 1 or _fits(shares, picks):
            return picks
    found = _search(shares, losses)
    if found is None:
        raise BudgetError("each limit can be met alone, but no choice was found that meets all of them; raise one.")
    return _filled(shares, losses, found)


def _allocate(shares: Sequence[Tensor], losses: Sequence[Sequence[float]], room: float) -> list[int]:
    """The exact choice whose shares of one limit sum to at most ``room``, but for rounding."""
    whole = [[math.floor(share * _UNIT) for share in layer.tolist()] for layer in shares]
    return allocate(whole, losses, math.ceil(room * _UNIT))


def _search(shares: Sequence[Tensor], losses: Sequence[Sequence[float]]) -> list[int] | None:
    """The best choice within all limits among those to which weighted sums of the limits lead."""
    limits = len(shares[0])
    weights = torch.full((limits,), 1 / limits, dtype=torch.float64)
    best, least, room, step = None, math.inf, 1.0, 8.0
    for _ in range(_STEPS):
        combined = [weights @ share for share in shares]
        cheapest = sum(float(each.min()) for each in combined)
        picks = _allocate(combined, losses, max(room, cheapest))
        used = _used(shares, picks)
        if _fits(shares, picks):
            loss = sum(layer[pick] for layer, pick in zip(losses, picks, strict=True))
            best, least = (picks, loss) if loss < least else (best, least)
            room = min(1.0, 1.02 * room)
        else:
            room /= float(used.max()) ** 0.5
        weights = weights * used**step
        weights /= weights.sum()
        step = max(0.8 * step, 0.5)
    return best


def _used(shares: Sequence[Tensor], picks: Sequence[int]) -> Tensor:
    """The part of each limit that a choice uses."""
    return torch.stack([share[:, pick] for share, pick in zip(shares, picks, strict=True)]).sum(0)


def _fits(shares: Sequence[Tensor], picks: Sequence[int]) -> bool:
    return bool((_used(shares, picks) <= 1 + 1e-12).all())


def _filled(shares: Sequence[Tensor], losses: Sequence[Sequence[float]], picks: Sequence[int]) -> list[int]:
    """A choice in which no layer alone can take a better option."""
    picks = list(picks)
    values = [torch.tensor(layer, dtype=torch.float64) for layer in losses]
    while True:
        used = _used(shares, picks)
        best, rate = None, 0.0
        for layer, (share, value) in enumerate(zip(shares, values, strict=True)):
            extra = share - share[:, picks[layer], None]
            gain = value[picks[layer]] - value
            fits = (used[:, None] + extra <= 1).all(0) & (gain > 0)
            rates = torch.where(fits, gain / extra.amax(0).clamp_min(1e-12), 0.0)
            if float(rates.max()) > rate:
                best, rate = (layer, int(rates.argmax())), float(rates.max())
        if best is None:
            return picks
        picks[best[0]] = best[1]
