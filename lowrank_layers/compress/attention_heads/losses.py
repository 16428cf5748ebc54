r"""By how much the loss grows with smaller heads, in the units of the other methods.

An output projection that reads fewer entries loses :math:`\tfrac12 \|G^{1/2} (W - C B) X^{1/2}\|^2`, as any layer does.
Removing a pair from queries and keys takes one product away, so that it is counted once, as an error of the keys. With
``D`` what the maps take from keys ``k``, and ``G`` of the gradients at the keys, it is :math:`\tfrac12 \mathrm{tr}(G D
E[k k^T] D^T)`, where of ``k`` only what tells keys apart counts. Where no gradients are known it is the part of all
products of queries and keys that is lost, times what is lost without the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStats
from ..candidates import Candidate
from ..damping import Damping
from ..hidden_units.problem import unit_problem
from ..regression import Metric, Regression
from .entries import losses_of, refit
from .maps import HeadMaps
from .problem import HeadProblem
from .rotary_pairs import Band, detuning

Bands = Sequence[tuple[Band, Tensor]]
"""Bands of pairs with the frequencies at which they turn."""


def lost_by_values(
    problem: HeadProblem, stats: LayerStats, damping: Damping, maps: Mapping[int, HeadMaps]
) -> dict[int, float]:
    """Returns by how much the loss grows by the output projection at each size.

    Args:
        problem: what is known of the attention.
        stats: statistics of the output projection.
        damping: ridges on moments.
        maps: the maps to heads of each size.
    """
    layer, heads = problem.attention.module.o_proj, problem.attention.heads
    regression = unit_problem(layer, stats.changed(free_bias=False), damping)
    return {
        size: regression.loss(read_from(regression, own.all_values(heads))) if size < problem.attention.size else 0.0
        for size, own in maps.items()
    }


def read_from(regression: Regression, kept: Tensor) -> Tensor:
    """Returns the best map that reads no more than fewer entries, as a matrix over all of them, ``[m, n]``.

    Args:
        regression: the weighted problem of the layer that reads them.
        kept: the map to those that stay, ``[r, n]``.
    """
    return refit(regression.weight, regression.inputs.matrix, kept, regression.moved) @ kept


def lost_by_keys(
    problem: HeadProblem,
    stats: LayerStats,
    damping: Damping,
    maps: Mapping[int, HeadMaps],
    bands: Mapping[int, Bands],
    frequencies: Tensor,
    context: int,
) -> dict[int, tuple[float, float]]:
    """Returns by how much the loss grows by fewer pairs of queries and keys at each size, and by their frequencies.

    Args:
        problem: what is known of the attention.
        stats: statistics of the projection of keys.
        damping: ridges on moments.
        maps: the maps to heads of each size.
        bands: the pairs that share places at each size.
        frequencies: radians per position of each pair.
        context: the largest distance of two tokens that counts.
    """
    layer, attention, moment = problem.attention.module.k_proj, problem.attention, problem.all_keys
    metric = Metric.of_outputs(stats, damping, moment.device)
    pairs, frequencies = frequencies.shape, frequencies.to(moment.device)
    if metric is None:
        scale = Candidate(layer, stats.changed(free_bias=False), damping=damping).energy / attention.groups
        weights = (problem.queries.diagonal(dim1=1, dim2=2) * problem.keys.diagonal(dim1=1, dim2=2)).real.sum(0)
    else:
        scale = 0.5 * stats.positions
        gradients, entries = (
            each.unflatten(0, (attention.groups, 2, *pairs)).sum(1) for each in (metric.diagonal, moment.diagonal())
        )
        weights = (gradients * entries).sum(0) / 2  # a turned error is as long in both entries of a pair
    found = {}
    for size, own in maps.items():
        if metric is None:
            lost = _part(problem, bands[size])
        else:
            gone = torch.eye(len(moment)).to(moment) - own.key_projector
            lost = float((metric.times(gone @ moment) * gone).sum()) if size < attention.size else 0.0
        turned = [
            detuning(frequencies[band.pairs], weights[band.pairs], context, common.to(moment.device))
            for band, common in bands[size]
            if band.rank
        ]
        found[size] = scale * lost, scale * sum(turned)
    return found


def _part(problem: HeadProblem, bands: Bands) -> float:
    """The part of the products of queries and keys that is lost, added up over groups."""
    keys = problem.keys
    pairs = [band.pairs for band, _ in bands]
    lost = [losses_of(problem.queries[:, each, each], keys[:, each, each]) for each in pairs]
    return float(sum(losses[:, band.rank].sum() for losses, (band, _) in zip(lost, bands, strict=True)))
