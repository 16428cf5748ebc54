"""One limit of bytes for all layers: the directions that save most error per byte are served first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_integer
from ..errors import BudgetError, LowRankError
from .autocast import without_autocast
from .bit_allocation import allocate_bits
from .bit_fit import KEY_ERROR_WEIGHT, BitPlan, comparable
from .compressed_tokens import grouped
from .low_rank_kv import LowRankKV
from .quantizers import Directions
from .subspace import Scatter
from .transform import Transform


class _Group(NamedTuple):
    """A subspace that will be fitted: its place, the relative error that each direction saves, the bytes of one."""

    layer: int
    side: int
    gains: Tensor
    cost: int


def compress_together(layers: Sequence[LowRankKV], budget: float | int) -> None:
    """Compresses the caches of several layers for the first time, with bits, or ranks, that share one limit of bytes.

    With bits, each direction of a group of heads gets 8, 4, 3, 2, 1 or none, and its column of the basis, as it saves
    error per byte. With ranks, each direction is kept or not. Those that save most are served first, over all layers,
    keys and values. Exact tokens, bases, means, scales and gains count as bytes.

    Args:
        layers: caches that hold the same tokens, none of them compressed yet.
        budget: a float in (0, 1] is a part of the bytes that the layers take now, an integer a number of bytes.

    Raises:
        BudgetError: if not even one direction fits, or with ranks one per group; nothing is compressed then.
        LowRankError: if a layer is compressed already, or ``budget`` is neither.

    Examples:
        >>> layers = [lr.LowRankKV(lr.KVSettings(keep_recent=16, block=16)) for _ in range(2)]
        >>> for scale, layer in enumerate(layers):
        ...     layer.append(torch.randn(1, 2, 400, 8) @ torch.randn(8, 8), torch.randn(1, 2, 400, 8))
        >>> exact = sum(layer.dense()[0].nbytes * 2 for layer in layers)
        >>> lr.compress_together(layers, 0.2)
        >>> sum(layer.nbytes() for layer in layers) <= 0.2 * exact
        True
    """
    check_budget(budget)
    if any(layer.old is not None for layer in layers):
        raise LowRankError("compress_together: a layer is compressed already; call reset() first.")
    if any(layer.first_fit() is None for layer in layers):
        return
    exact = sum(len(layer) * _token_nbytes(layer) for layer in layers)
    limit = int(budget * exact) if isinstance(budget, float) else budget
    limit -= sum(_fixed_nbytes(layer) for layer in layers)
    if layers and layers[0].settings.by_rank:
        _share_ranks(layers, limit)
    else:
        _share_bits(layers, limit)
    for layer in layers:
        layer.waits_for_budget = False
        layer.compress()


def _share_bits(layers: Sequence[LowRankKV], limit: int) -> None:
    """Plans the bits of all directions."""
    transforms = [_transforms(layer) for layer in layers]
    groups, counts = [], []
    for layer, pair in zip(layers, transforms, strict=True):
        batch, tokens = layer.like().shape[0], _old_tokens(layer)
        for side, each in enumerate(pair):
            width = each.basis.shape[2]
            # a column in int8, its scale and its weight
            first = 0 if layer.fits.plan is not None else batch * (width + 8)
            variances = comparable(each, values=side == 1)
            groups += [Directions(v, batch * tokens / 8, first) for v in variances]
            counts.append(len(variances))
    widths = iter(allocate_bits(groups, limit))
    sides = [[next(widths) for _ in range(count)] for count in counts]
    if not any(sum(each) for side in sides for each in side):
        raise _too_little(limit, math.ceil(min(4 * group.first + 8 * group.bit for group in groups)))
    for index, (layer, pair) in enumerate(zip(layers, transforms, strict=True)):
        shared = layer.fits.plan is not None
        layer.fits.budgeted = BitPlan(pair, (sides[2 * index], sides[2 * index + 1]), shared)


def _transforms(layer: LowRankKV) -> tuple[Transform, Transform]:
    """The model's directions where it has some, or those of the first tokens."""
    if layer.fits.plan is not None:
        return layer.fits.plan.transforms
    span = layer.first_fit()
    assert span is not None
    with without_autocast(layer.like().device):
        return layer.fits.transforms(layer.leaving(*span), layer.frame(), layer.counting(*span))


def _share_ranks(layers: Sequence[LowRankKV], limit: int) -> None:
    """Chooses the ranks of all groups of heads."""
    groups = []
    for index, layer in enumerate(layers):
        for side, scatter in enumerate(_scatters(layer)):
            energies = scatter.spectrum()[0].mean(0).cpu()
            weight = 1.0 if side else KEY_ERROR_WEIGHT
            gains = energies / energies.sum(-1, keepdim=True).clamp_min(1e-30) * weight
            cost = _direction_nbytes(layer, side, scatter.mean.shape[-1])
            groups += [_Group(index, side, each, cost) for each in gains]
    ranks = _share(groups, limit)
    for index, layer in enumerate(layers):
        own = [
            [rank for rank, group in zip(ranks, groups, strict=True) if (group.layer, group.side) == (index, side)]
            for side in (0, 1)
        ]
        layer.fits.ranks = own[0], own[1]


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
    frames, keep, least = (layer.frame(), None), layer.counting(*span), layer.settings.at_first
    with without_autocast(layer.like().device):
        return [
            Scatter.of(grouped(x, layer.fits.together(x)), frame, keep=keep).pooled(least)
            for x, frame in zip(layer.leaving(*span), frames, strict=True)
        ]


def _token_nbytes(layer: LowRankKV) -> int:
    """Bytes of an exact token."""
    return sum(layer.like(side)[:, :, :1].nbytes for side in (0, 1))


def _old_tokens(layer: LowRankKV) -> int:
    """Number of tokens that a first fit compresses."""
    first, stop = layer.first_fit() or (0, 0)
    return stop - first


def _fixed_nbytes(layer: LowRankKV) -> int:
    """Bytes that a first fit leaves whatever the directions: exact tokens, means, and numbers per token."""
    batch, heads = layer.like().shape[:2]
    first, stop = layer.first_fit() or (0, 0)
    kept = first + max(layer.settings.recent + layer.settings.block_on(layer.like().device), len(layer) - stop)
    total = kept * _token_nbytes(layer) + layer.padding.nbytes
    for side in (0, 1):
        like = layer.like(side)
        groups = heads // layer.fits.together(like)
        basis_dtype, dtype = layer.settings.dtypes(like.dtype)
        if not layer.settings.by_rank:
            total += batch * (4 * heads * like.shape[3] if layer.fits.plan is None else 0)
            total += (stop - first) * batch * groups
            continue
        total += batch * heads * like.shape[3] * basis_dtype.itemsize
        if dtype == torch.int8:
            total += 2 * (stop - first) * batch * groups
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
        raise _too_little(left, least)
    gains = torch.cat([group.gains[1:] / group.cost for group in groups])
    owner = torch.cat([torch.full((len(group.gains) - 1,), index) for index, group in enumerate(groups)])
    costs = torch.tensor([group.cost for group in groups])
    order = gains.argsort(descending=True, stable=True)
    taken = owner[order][least + costs[owner[order]].cumsum(0) <= left]
    return [1 + int(count) for count in torch.bincount(taken, minlength=len(groups))]


def _too_little(left: int, least: int) -> BudgetError:
    """For a limit under which no directions fit."""
    return BudgetError(
        f"compress_together: {max(left, 0)} bytes are left for coefficients and bases, expected at least {least};"
        " give a greater budget, or keep fewer tokens exact."
    )
