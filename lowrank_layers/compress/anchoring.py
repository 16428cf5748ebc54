r"""How far a layer in sequence is fitted to the dense model's outputs, chosen on rows that were held out.

Behind the compressed prefix a layer is given ``x'`` in the place of ``x``. Its own outputs there are ``W x'``, those of
the dense model ``W x``. The regression of ``x`` on ``x'`` is

.. math:: P = I + \beta D (S + \lambda I)^{-1},  S = E[x' x'^T],  D = E[(x - x') x'^T]

with ``W P`` in the place of ``W``: anchored to the dense model for ``beta = 1`` and a small ridge, the layer's own
outputs for ``beta = 0`` or a large one. ``D`` is estimated from few rows and has many columns, so both are chosen by
the error ``E || G^(1/2) W (x - P x') ||^2`` of rows that were held out, and then used with all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..calibrate.statistics import LayerStats
from ..layers import matrices_of
from ..linalg import LowRankRoot, Root, full_precision, psd_root
from .damping import Damping
from .paired_moments import PairedMoments
from .regression import Metric, add_ridge_

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried after that of the damping, relative to the mean variance of the inputs."""
BLENDS = (1.0, 0.75, 0.5, 0.25)
"""Parts ``beta`` of the way to the dense model's outputs."""
OUTPUTS = 128
"""Random sums of outputs whose error is compared, of layers with more than twice as many."""
CLEARLY = 1.02
"""How much more than the plain regression (``beta = 1``, the ridge of the damping) another one has to gain."""


@full_precision
def anchored(
    dense: nn.Module, stats: LayerStats, held_out: PairedMoments, damping: Damping, *, has_bias: bool
) -> LayerStats | None:
    """Returns a layer's statistics with the cross moment of ``P x'`` in the place of that of ``x``.

    ``None`` where held-out rows gain nothing by any ``P`` but the identity.

    Args:
        dense: the dense layer.
        stats: its statistics, with all rows behind the compressed prefix, and ``cross``.
        held_out: the moments of those rows that are held out.
        damping: ridges on the moments.
        has_bias: whether the layer that is fitted has a bias, which takes care of the means.
    """
    weights = matrices_of(dense)
    groups = [(stats.group(k), held_out.group(k)) for k in range(len(weights))]
    chosen = [_choose(weight, *group, damping, has_bias) for weight, group in zip(weights, groups, strict=True)]
    if not any(blend for _, blend in chosen):
        return None
    if all(choice == (damping.inputs, 1.0) for choice in chosen):
        return stats
    crosses = [_cross(own, *choice, damping.inputs, has_bias) for choice, (own, _) in zip(chosen, groups, strict=True)]
    return stats.changed(cross=crosses[0] if stats.inputs.mean.ndim == 1 else torch.stack(crosses))


def _choose(
    weight: Tensor, stats: LayerStats, held_out: PairedMoments, damping: Damping, has_bias: bool
) -> tuple[float, float]:
    """The ridge, relative to the mean variance, and the blend with the least error on the rows held out."""
    second, difference = _moments(stats, has_bias)
    held_second, held_difference = held_out.about(*_centres(stats, has_bias))
    held_difference -= held_second
    share = held_out.inputs.rows / stats.inputs.rows
    for whole, part in ((second, held_second), (difference, held_difference)):
        whole.sub_(part, alpha=share).div_(1 - share)
    unit = second.diagonal().mean()
    if not unit > 0:
        return damping.inputs, 1.0
    weight, root = weight.double(), _root(stats, damping)
    weighted = weight if root is None else root.times(weight)
    if len(weighted) > 2 * OUTPUTS:  # as good to compare by: squared norms of random sums of rows are theirs on average
        signs = torch.randn(OUTPUTS, len(weighted), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weighted = signs.to(weighted) @ weighted
    fitted, seen = weighted @ difference, weighted @ held_difference
    del difference, held_difference
    best, choice, before = 0.0, (damping.inputs, 0.0), -float("inf")
    for ridge in (damping.inputs, *(ridge for ridge in RIDGES if ridge > damping.inputs)):
        solved = psd_root(add_ridge_(second.clone(), ridge * unit)).solve(fitted.mT).mT
        gain, cost = float((solved * seen).sum()), float(((solved @ held_second) * solved).sum())
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


def _cross(stats: LayerStats, ridge: float, blend: float, own_ridge: float, has_bias: bool) -> Tensor:
    """``P (S + own I) - own I``, to which the regression adds its own ridge again, centred."""
    second, difference = _moments(stats, has_bias)
    unit = second.diagonal().mean()
    moved = blend * difference
    if ridge != own_ridge and blend > 0:
        root = psd_root(add_ridge_(second.clone(), ridge * unit))
        moved.add_(root.solve(difference.mT).mT, alpha=float(blend * (own_ridge - ridge) * unit))
    moved += second
    if not has_bias:
        assert stats.target_mean is not None
        moved.addr_(stats.target_mean, stats.inputs.mean, alpha=-1)
    return moved


def _moments(stats: LayerStats, has_bias: bool) -> tuple[Tensor, Tensor]:
    """``S`` and ``D`` of all rows, new."""
    mean, target, cross = stats.inputs.mean, stats.target_mean, stats.cross
    assert target is not None
    assert cross is not None
    if has_bias:
        second = stats.inputs.covariance()
        return second, cross - second
    second = stats.inputs.second.clone()
    return second, torch.addr(cross, target, mean).sub_(second)


def _centres(stats: LayerStats, has_bias: bool) -> tuple[Tensor, Tensor]:
    """What is taken off ``x'`` and ``x``."""
    mean, target = stats.inputs.mean, stats.target_mean
    assert target is not None
    return (mean, target) if has_bias else (torch.zeros_like(mean), torch.zeros_like(target))


def _root(stats: LayerStats, damping: Damping) -> Root | LowRankRoot | None:
    gradients = stats.gradients
    if gradients is None or not bool(gradients.count_nonzero()):
        return None
    return Metric.of_gradients(gradients, damping.outputs).root
