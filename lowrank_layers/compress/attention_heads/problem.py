"""What is known of one attention: what its queries read in keys, and its output projection in values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStats
from ...linalg import damp
from ..damping import Damping, rounding_of
from ..regression import Metric, to_diagonal_
from .entries import maps_to
from .find import Attention
from .maps import HeadMaps
from .rotary_pairs import Band, from_pairs, pair_moment, to_pairs


@dataclass(frozen=True)
class HeadProblem:
    """The moments by which the heads of one attention lose the least.

    Args:
        attention: the attention.
        queries: ``E[q q^H]`` of the pairs of the queries that read the keys of a group, added up over its heads, in
            parts of what all pairs lose, ``[groups, p, p]``.
        all_keys: second moment of what tells keys apart, ``[groups * d, groups * d]``.
        readers: ``E[g g^T]`` of what the output projection reads in the values of a group, ``[groups, d, d]``.
        values: second moment of the values of a group as the heads deliver them, ``[groups, d, d]``.
    """

    attention: Attention
    queries: Tensor
    all_keys: Tensor
    readers: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, attention: Attention, keys: LayerStats, outputs: LayerStats, seen: Tensor, damping: Damping
    ) -> HeadProblem:
        """Returns the problem.

        Args:
            attention: the attention.
            keys: statistics of ``k_proj``, whose inputs are those of the attention.
            outputs: statistics of ``o_proj``; errors of its outputs are weighted by their gradients, if they are known.
            seen: how much of its mean each pair of a key shows, ``[p]``; see ``seen_means`` of ``rotary_pairs.py``.
            damping: ridges on moments.
        """
        queries, means = _spread(attention, "q_proj", keys, damping)
        pairs = _pairs(means, attention)
        own = _pair_moments(queries, attention) + pairs[:, :, None] * pairs[:, None, :].conj()
        own = own.unflatten(0, (attention.groups, -1)).sum(1)
        moment, means = _spread(attention, "k_proj", keys, damping)
        shown = seen.sqrt().to(means.device) * _pairs(means, attention)
        rows = torch.cat([from_pairs(each[:, None])[:, 0] for each in shown])
        moment = moment.addr(rows, rows)
        each = _pair_moments(moment, attention)
        total = (own.diagonal(dim1=1, dim2=2) * each.diagonal(dim1=1, dim2=2)).real.sum(1)
        own = own / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None, None]
        return cls(attention, own, moment, _readers(attention, outputs, damping), _values(attention, outputs, damping))

    @property
    def keys(self) -> Tensor:
        """``E[k k^H]`` of the pairs of what tells keys apart, ``[groups, p, p]``."""
        return _pair_moments(self.all_keys, self.attention)

    def maps(self, bands: Sequence[Band], size: int) -> HeadMaps:
        """Returns the maps to heads of ``size`` entries, whose pairs are those of the bands."""
        both = [
            [maps_to(queries[band.pairs, band.pairs], keys[band.pairs, band.pairs], band.rank) for band in bands]
            for queries, keys in zip(self.queries, self.keys, strict=True)
        ]
        queries, keys = (torch.stack([_real_map([band[side] for band in each]) for each in both]) for side in (0, 1))
        values = [maps_to(readers, moment, size) for readers, moment in zip(self.readers, self.values, strict=True)]
        return HeadMaps(queries, keys, *(torch.stack(side) for side in zip(*values, strict=True)))


def value_moment(attention: Attention, outputs: LayerStats, damping: Damping) -> Tensor:
    """Returns the second moment of what the heads deliver to the output projection, ``[heads * d, heads * d]``.

    Args:
        attention: the attention.
        outputs: statistics of ``o_proj``.
        damping: ridges on moments.
    """
    weight = attention.module.o_proj.weight
    second = to_diagonal_(outputs.inputs.second.to(weight.device).clone(), damping.input_shrinkage)
    return damp(second, max(damping.inputs, rounding_of(weight.dtype)))


def _values(attention: Attention, outputs: LayerStats, damping: Damping) -> Tensor:
    """The second moment of the values of each group, the mean of those that its heads deliver."""
    heads = attention.groups * attention.heads
    blocks = value_moment(attention, outputs, damping).unflatten(1, (heads, -1)).unflatten(0, (heads, -1))
    own: Tensor = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).unflatten(0, (attention.groups, -1)).mean(1)
    return own


def _readers(attention: Attention, outputs: LayerStats, damping: Damping) -> Tensor:
    """What the output projection reads in the values of each group, added up over its heads."""
    weight, _ = attention.projection("o_proj")
    metric = Metric.of_outputs(outputs, damping, weight.device)
    columns, weighted = (
        each.unflatten(1, (attention.groups, attention.heads, -1)).movedim(0, 2)
        for each in (weight, weight if metric is None else metric.times(weight))
    )  # [groups, heads, out, d]
    readers: Tensor = (columns.mT @ weighted).sum(1)
    return readers


def _spread(attention: Attention, key: str, stats: LayerStats, damping: Damping) -> tuple[Tensor, Tensor]:
    """Centred second moment ``[heads * d, heads * d]`` and mean ``[heads * d]`` of a projection's outputs."""
    weight, bias = attention.projection(key)
    mean, second = (each.to(weight.device) for each in (stats.inputs.mean, stats.inputs.second))
    centred = to_diagonal_(second - mean.outer(mean), damping.input_shrinkage)
    spread = damp(centred, max(damping.inputs, rounding_of(attention.module.o_proj.weight.dtype)))
    return weight @ spread @ weight.mT, weight @ mean + (0 if bias is None else bias)


def _pairs(vector: Tensor, attention: Attention) -> Tensor:
    """The entries of each head as pairs, ``[heads, p]``."""
    return torch.stack([to_pairs(head[:, None])[:, 0] for head in vector.unflatten(0, (-1, attention.size))])


def _pair_moments(moment: Tensor, attention: Attention) -> Tensor:
    """The second moments of the pairs of each head, ``[heads, p, p]``."""
    blocks = moment.unflatten(1, (-1, attention.size)).unflatten(0, (-1, attention.size))
    return torch.stack([pair_moment(each) for each in blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)])


def _real_map(parts: Sequence[Tensor]) -> Tensor:
    """The map of entries that maps of the pairs in bands are, ``[2 r, 2 p]``."""
    whole = torch.block_diag(*parts)
    return torch.cat([torch.cat([whole.real, -whole.imag], 1), torch.cat([whole.imag, whole.real], 1)])
