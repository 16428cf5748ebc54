"""One limit of bytes for all layers: each layer, side and head gets the directions that save most error per byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_integer
from ..errors import BudgetError, LowRankError
from .autocast import without_autocast
from .compressed_tokens import grouped
from .low_rank_kv import LowRankKV
from .subspace import Scatter

KEY_ERROR_WEIGHT = 2.0
"""Weight of the relative error of keys, where that of values has one: measured on a trained Llama."""


class _Group(NamedTuple):
    """A subspace that will be fitted: its place, the relative error that each direction saves, the bytes of one."""

    layer: int
    side: int
    gains: Tensor
    cost: int


def compress_together(layers: Sequence[LowRankKV], budget: float | int) -> None:
    """Compresses the caches of several layers for the first time, with ranks that share one limit of bytes.

    Each direction of a group of heads saves a part of the group's energy. Those that save most per byte are taken, over
    all layers, keys and values. Exact tokens, bases, means and scales count as bytes.

    Args:
        layers: caches that hold the same tokens, none of them compressed yet.
        budget: a float in (0, 1] is a part of the bytes that the layers take now, an integer a number of bytes.

    Raises:
        BudgetError: if not even one direction per group fits; nothing is compressed then.
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
        if layer.first_fit() is None:
            return
        exact += len(layer) * _token_nbytes(layer)
        fixed += _fixed_nbytes(layer)
        for side, scatter in enumerate(_scatters(layer)):
            energies = scatter.spectrum()[0].mean(0).cpu()
            weight = 1.0 if side else KEY_ERROR_WEIGHT
            gains = energies / energies.sum(-1, keepdim=True).clamp_min(1e-30) * weight
            cost = _direction_nbytes(layer, side, scatter.mean.shape[-1])
            groups += [_Group(index, side, each, cost) for each in gains]
    limit = int(budget * exact) if isinstance(budget, float) else budget
    ranks = _share(groups, limit - fixed)
    for index, layer in enumerate(layers):
        own = [
            [rank for rank, group in zip(ranks, groups, strict=True) if (group.layer, group.side) == (index, side)]
            for side in (0, 1)
        ]
        layer.ranks, layer.waits_for_budget = (own[0], own[1]), False
        layer.compress()


def check_budget(budget: object) -> None:
    """Raises unless this is a part of a cache or a number of bytes.

    Args:
        budget: what was given.
    """
    part = isinstance(budget, float) and 0 < budget <= 1
    if not part and not is_integer(budget, 1):
        raise LowRankError(f"got budget={budget!r}, expected a part in (0, 1] (a float) or bytes (an integer).")


def _scatters(layer: LowRankKV) -> list[Scatter]:
    """What a first fit of keys and of values looks at."""
    span = layer.first_fit()
    assert span is not None
    with without_autocast(layer.like().device):
        return [Scatter.of(grouped(x, x.shape[1] if layer.settings.joint else 1)) for x in layer.leaving(*span)]


def _token_nbytes(layer: LowRankKV) -> int:
    """Bytes of an exact token."""
    return sum(layer.like(side)[:, :, :1].nbytes for side in (0, 1))


def _fixed_nbytes(layer: LowRankKV) -> int:
    """Bytes that a first fit leaves at any rank: exact tokens, means and scales."""
    batch, heads = layer.like().shape[:2]
    first, stop = layer.first_fit() or (0, 0)
    kept = first + max(layer.settings.keep_recent + layer.settings.block, len(layer) - stop)
    total = kept * _token_nbytes(layer)
    for side in (0, 1):
        like = layer.like(side)
        basis_dtype, dtype = layer.settings.dtypes(like.dtype)
        total += batch * heads * like.shape[3] * basis_dtype.itemsize
        if dtype == torch.int8:
            total += 2 * (stop - first) * batch * (1 if layer.settings.joint else heads)
    return total


def _direction_nbytes(layer: LowRankKV, side: int, width: int) -> int:
    """Bytes of one more direction of a group of that width: coefficients and basis."""
    basis_dtype, dtype = layer.settings.dtypes(layer.like(side).dtype)
    first, stop = layer.first_fit() or (0, 0)
    return layer.like().shape[0] * ((stop - first) * dtype.itemsize + width * basis_dtype.itemsize)


def _share(groups: Sequence[_Group], left: int) -> list[int]:
    """The ranks of all groups under a limit.

    Gains fall within a group, and its directions cost the same: the best choice takes the first ones of each.
    """
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
