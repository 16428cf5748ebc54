r"""How far a layer in sequence is fitted to the dense model's outputs, chosen on rows that were held out.

Behind the compressed prefix a layer is given ``x'`` in the place of ``x``. Its own outputs there are ``W x'``, those of
the dense model ``W x``. The regression of ``x`` on ``x'`` is

.. math:: P = I + \beta D (S + \lambda I)^{-1},  S = E[x' x'^T],  D = E[(x - x') x'^T]

with ``W P`` in the place of ``W``: anchored to the dense model for ``beta = 1`` and a small ridge, the layer's own
outputs for ``beta = 0`` or a large one. ``D`` is estimated from few rows and has many columns, so both are chosen by
the error ``E || G^(1/2) W (x - P x') ||^2`` of rows that were held out, and then used with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibrate.readable import own_copy
from ..calibrate.statistics import LayerStats
from ..layers import matrices_of
from ..linalg import Root, full_precision, psd_root
from .damping import Damping
from .paired_moments import PairedMoments
from .regression import Metric

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried after that of the damping, relative to the mean variance of the inputs."""
BLENDS = (1.0, 0.75, 0.5, 0.25)
"""Parts ``beta`` of the way to the dense model's outputs."""
OUTPUTS = 128
"""Random sums of outputs whose error is compared, of layers with more than twice as many."""
_ROWS = 512
"""Rows of a moment that are solved for at once."""
CLEARLY = 1.02
"""How much more than the plain regression (``beta = 1``, the ridge of the damping) another one has to gain."""


@full_precision
def anchored(
    dense: nn.Module,
    stats: LayerStats,
    held_out: PairedMoments,
    damping: Damping,
    outputs: Sequence[Metric | None] | None = None,
    *,
    has_bias: bool,
) -> LayerStats | None:
    """Returns a layer's statistics with the cross moment of ``P x'`` in the place of that of ``x``.

    ``None`` where held-out rows gain nothing by any ``P`` but the identity.

    Args:
        dense: the dense layer.
        stats: its statistics, with all rows behind the compressed prefix, and ``cross``.
        held_out: the moments of those rows that are held out.
        damping: ridges on the moments.
        outputs: the metric of each group's outputs, where it is computed already.
        has_bias: whether the layer that is fitted has a bias, which takes care of the means.
    """
    weights = matrices_of(dense)
    groups = [(stats.group(k), held_out.group(k)) for k in range(len(weights))]
    if outputs is None:
        outputs = [Metric.of_outputs(own, damping, weights.device) for own, _ in groups]
    chosen = [
        _choose(_weighted(weight, metric), *group, damping, has_bias)
        for weight, metric, group in zip(weights, outputs, groups, strict=True)
    ]
    if not any(blend for _, blend in chosen):
        return None
    if not damping.input_shrinkage and all(choice == (damping.inputs, 1.0) for choice in chosen):
        return stats
    crosses = [_cross(own, *choice, damping, has_bias) for choice, (own, _) in zip(chosen, groups, strict=True)]
    return stats.changed(cross=crosses[0] if stats.inputs.mean.ndim == 1 else torch.stack(crosses))


def _choose(
    weighted: Tensor, stats: LayerStats, held_out: PairedMoments, damping: Damping, has_bias: bool
) -> tuple[float, float]:
    """The ridge, relative to the mean variance, and the blend with the least error on the rows held out."""
    second = _second(stats, has_bias)
    fitted = _after(weighted, stats, has_bias) - weighted @ second
    held_second, held_cross = held_out.about(*_centres(stats, has_bias))
    seen = held_cross.after(weighted).sub_(held_second.after(weighted))
    del held_cross
    share = held_out.inputs.rows / stats.inputs.rows
    held_second.add_to_(second, -share).div_(1 - share)
    fitted.sub_(seen, alpha=share).div_(1 - share)
    unit = second.diagonal().mean()
    if not unit > 0:
        return damping.inputs, 1.0
    best, choice, before = 0.0, (damping.inputs, 0.0), -float("inf")
    for ridge in (damping.inputs, *(ridge for ridge in RIDGES if ridge > damping.inputs)):
        solved = psd_root(second, ridge=ridge * unit).solve_rows_(fitted.clone())
        gain, cost = float((solved * seen).sum()), float((held_second.after(solved) * solved).sum())
        gains = [2 * blend * gain - blend**2 * cost for blend in BLENDS]
        top = max(gains)
        if ridge == damping.inputs and gains[0] > 0 and CLEARLY * gains[0] >= top:
            best, choice = CLEARLY * gains[0], (ridge, 1.0)
        elif top > best:
            best, choice = top, (ridge, BLENDS[gains.index(top)])
        if top < before:  # it only falls from here on
            break
        before = top
    return choice


def _weighted(weight: Tensor, outputs: Metric | None) -> Tensor:
    """``G^(1/2) W``, whose errors are compared, or random sums of its rows where they are many.

    Squared norms of random sums of rows are theirs on average, and so as good to compare by.
    """
    weight, root, rows = weight.double(), None if outputs is None else outputs.root, len(weight)
    if rows <= 2 * OUTPUTS:
        return weight if root is None else root.times(weight)
    signs = torch.randn(OUTPUTS, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight)
    if isinstance(root, Root):
        return root.after(signs) @ weight
    return signs @ (weight if root is None else root.times(weight))


def _cross(stats: LayerStats, ridge: float, blend: float, damping: Damping, has_bias: bool) -> Tensor:
    """``P (S + R) - R``, centred, with ``R`` the diagonal matrix that the regression adds to both moments.

    It is what damping adds, relative to what it leaves of ``S``. ``P (S + R) - R = S + beta D (I + (S + ridge I)^{-1}
    (R - ridge I))``.
    """
    second = _second(stats, has_bias)
    if not blend:
        return _centred(second, stats, has_bias)
    unit = second.diagonal().mean()
    moved = own_copy(stats, "cross")
    if not has_bias:
        moved.addr_(*_means(stats))
    moved -= second
    share = damping.input_shrinkage
    added = (share * second.diagonal() + damping.inputs * unit) / (1 - share) - ridge * unit
    root = psd_root(second, ridge=ridge * unit) if bool(added.count_nonzero()) else None
    for own, part in zip(moved.split(_ROWS), second.split(_ROWS), strict=True):
        solved = None if root is None else root.solve_rows_(own.clone())
        own.mul_(blend).add_(part)
        if solved is not None:
            own.addcmul_(solved, blend * added)
    return _centred(moved, stats, has_bias)


def _centred(moved: Tensor, stats: LayerStats, has_bias: bool) -> Tensor:
    """A moment from which the means are taken where that is not done, in place."""
    return moved if has_bias else moved.addr_(*_means(stats), alpha=-1)


def _second(stats: LayerStats, has_bias: bool) -> Tensor:
    """``S`` of all rows, new."""
    second, mean = own_copy(stats.inputs, "second"), stats.inputs.mean
    return second.addr_(mean, mean, alpha=-1) if has_bias else second


def _after(rows: Tensor, stats: LayerStats, has_bias: bool) -> Tensor:
    """``rows (D + S)`` of all rows of inputs."""
    cross = stats.cross
    assert cross is not None
    product = rows @ cross
    if has_bias:
        return product
    target, mean = _means(stats)
    return product.addr_(rows @ target, mean)


def _means(stats: LayerStats) -> tuple[Tensor, Tensor]:
    """``E[x]`` and ``E[x']``."""
    target = stats.target_mean
    assert target is not None
    return target, stats.inputs.mean


def _centres(stats: LayerStats, has_bias: bool) -> tuple[Tensor, Tensor]:
    """What is taken off ``x'`` and ``x``."""
    mean, target = stats.inputs.mean, stats.target_mean
    assert target is not None
    return (mean, target) if has_bias else (torch.zeros_like(mean), torch.zeros_like(target))
