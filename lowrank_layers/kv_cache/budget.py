"""One limit of bytes for all layers: every layer, side and head gets the directions that save most error a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BudgetError, LowRankError
from .low_rank_kv import LowRankKV

KEYS_COUNT = 2.0
"""How much the relative error of keys counts against that of values: measured, on a trained Llama."""


class _Group(NamedTuple):
    """One subspace to be: whose it is, the relative error that each direction saves, and the bytes of one."""

    layer: int
    values: bool
    gains: Tensor
    cost: int


def compress_together(layers: Sequence[LowRankKV], budget: float | int) -> None:
    """Compresses layers for the first time, with ranks that share one limit of bytes.

    A direction of a group of heads saves its part of the group's energy; those that save most a byte are taken, over
    all layers, keys and values. What stays exact, the bases, means and scales count.

    Args:
        layers: that hold the same tokens, none of them compressed yet.
        budget: a float in (0, 1] is a part of what they take now, an integer a number of bytes.

    Raises:
        BudgetError: if not even one direction a group fits; nothing is compressed then.
        LowRankError: if a layer is compressed already, or ``budget`` is neither.

    Examples:
        >>> layers = [lr.LowRankKV(lr.KVSettings(rank=8, keep_recent=16, block=16)) for _ in range(2)]
        >>> for scale, layer in enumerate(layers):
        ...     layer.append(torch.randn(1, 2, 400, 8) @ torch.randn(8, 8), torch.randn(1, 2, 400, 8))
        >>> exact = sum(layer.dense()[0].nbytes * 2 for layer in layers)
        >>> lr.compress_together(layers, 0.5)
        >>> sum(layer.nbytes() for layer in layers) <= 0.5 * exact
        True
    """
    check_budget(budget)
    if any(layer.old is not None for layer in layers):
        raise LowRankError("compress_together: a layer is compressed already; call reset() first.")
    groups, fixed, exact = [], 0, 0
    for index, layer in enumerate(layers):
        scatters = layer.scatters()
        if scatters is None:
            return
        exact += layer.exact_nbytes()
        fixed += layer.fixed_nbytes()
        for values, scatter in zip((False, True), scatters, strict=True):
            energies = scatter.spectrum()[0].mean(0).cpu()
            gains = energies / energies.sum(-1, keepdim=True).clamp_min(1e-30) * (1.0 if values else KEYS_COUNT)
            cost = layer.direction_nbytes(scatter.mean.shape[-1], values=values)
            groups += [_Group(index, values, each, cost) for each in gains]
    limit = int(budget * exact) if isinstance(budget, float) else budget
    ranks = _share(groups, limit - fixed)
    for index, layer in enumerate(layers):
        own = [
            [rank for rank, group in zip(ranks, groups, strict=True) if group.layer == index and group.values == values]
            for values in (False, True)
        ]
        layer.ranks, layer.waits = (own[0], own[1]), False
        layer.compress()


def check_budget(budget: object) -> None:
    """Refuses what is neither a part of a cache nor a number of bytes."""
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not (0 < budget <= 1 if isinstance(budget, float) else budget >= 1):  # type: ignore[operator]
        raise LowRankError(f"got budget={budget!r}, expected a part in (0, 1] (a float) or bytes (an integer).")


def _share(groups: Sequence[_Group], left: int) -> list[int]:
    """Ranks under a limit; gains fall within a group and its directions cost the same: the best ones are prefixes."""
    least = sum(group.cost for group in groups)
    if least > left:
        raise BudgetError(
            f"compress_together: {max(left, 0)} bytes are left for coefficients and bases, expected at least {least};"
            " give a greater budget, or keep fewer tokens exact."
        )
    gains = torch.cat([group.gains[1:] / group.cost for group in groups])
    owner = torch.cat([torch.full((len(group.gains) - 1,), index) for index, group in enumerate(groups)])
    costs = torch.tensor([group.cost for group in groups])
    order = gains.argsort(descending=True, stable=True)
    taken = owner[order][least + costs[owner[order]].cumsum(0) <= left]
    return [1 + int(count) for count in torch.bincount(taken, minlength=len(groups))]
