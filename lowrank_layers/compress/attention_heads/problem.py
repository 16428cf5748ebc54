"""What is known of one attention: what its queries read in keys, and its output projection in values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStats
from ...linalg import damp
from ..damping import rounding_of
from .entries import maps_to, refit
from .find import Attention, Weights
from .rotary_pairs import Band, from_pairs, pair_moment, to_pairs


@dataclass(frozen=True)
class HeadProblem:
    """The moments by which the heads of one attention lose the least.

    Args:
        attention: the attention.
        queries: ``E[q q^H]`` of the pairs of the queries that read the keys of a group, added up over its heads, in
            parts of what all pairs lose, ``[groups, p, p]``.
        keys: ``E[k k^H]`` of what tells keys apart, ``[groups, p, p]``.
        values: second moment of what the heads deliver to the output projection, ``[heads * d, heads * d]``.
    """

    attention: Attention
    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, attention: Attention, keys: LayerStats, outputs: LayerStats, seen: Tensor, damping: float
    ) -> HeadProblem:
        """Returns the problem.

        Args:
            attention: the attention.
            keys: statistics of ``k_proj``, whose inputs are those of the attention.
            outputs: statistics of ``o_proj``.
            seen: how much of its mean each pair of a key shows, ``[p]``; see ``seen_means`` of ``rotary_pairs.py``.
            damping: the ridge on moments, relative to the mean of their diagonals.
        """
        mean, second = keys.inputs.mean, keys.inputs.second
        size, dtype = attention.size, attention.module.o_proj.weight.dtype
        damping = max(damping, rounding_of(dtype))
        spread = damp(second - mean.outer(mean), damping)

        def moments(key: str) -> tuple[Tensor, Tensor]:
            """Mean ``[heads, p]`` and centred second moment ``[heads, p, p]`` of the pairs of each head."""
            weight, bias = attention.projection(key)
            rows = weight.unflatten(0, (-1, size))
            means = (weight @ mean + (0 if bias is None else bias)).unflatten(0, (-1, size))
            pairs = torch.stack([to_pairs(each[:, None])[:, 0] for each in means])
            return pairs, torch.stack([pair_moment(head @ spread @ head.mT) for head in rows])

        means, queries = moments("q_proj")
        queries = queries + means[:, :, None] * means[:, None, :].conj()
        queries = queries.unflatten(0, (attention.groups, -1)).sum(1)
        means, each = moments("k_proj")
        shown = seen.sqrt() * means
        each = each + shown[:, :, None] * shown[:, None, :].conj()
        total = (queries.diagonal(dim1=1, dim2=2) * each.diagonal(dim1=1, dim2=2)).real.sum(1)
        values = damp(outputs.inputs.second, damping)
        return cls(attention, queries / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None, None], each, values)

    def weights(self, bands: list[Band], size: int) -> Weights:
        """Returns the projections of heads of ``size`` entries."""
        found = self._queries_and_keys(bands)
        found.update(self._values_and_outputs(size))
        return found

    def _queries_and_keys(self, bands: list[Band]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """``q_proj`` and ``k_proj``, whose pairs become those of the bands."""
        maps = [
            [maps_to(queries[band.pairs, band.pairs], keys[band.pairs, band.pairs], band.rank) for band in bands]
            for queries, keys in zip(self.queries, self.keys, strict=True)
        ]

        def mapped(key: str, side: int, heads: int) -> tuple[Tensor, Tensor | None]:
            weight, bias = self.attention.projection(key)
            rows = _with_bias(weight, bias).unflatten(0, (self.attention.groups, heads, -1))
            new = []
            for group, group_maps in zip(rows, maps, strict=True):
                for head in group:
                    pairs = to_pairs(head)
                    parts = [each[side] @ pairs[band.pairs] for band, each in zip(bands, group_maps, strict=True)]
                    new.append(from_pairs(torch.cat(parts)))
            return _without_bias(torch.cat(new), bias)

        return {"q_proj": mapped("q_proj", 0, self.attention.heads), "k_proj": mapped("k_proj", 1, 1)}

    def _values_and_outputs(self, size: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """``v_proj`` and ``o_proj``, between which fewer entries pass."""
        groups, heads, old = self.attention.groups, self.attention.heads, self.attention.size
        weight, bias = self.attention.projection("o_proj")
        columns = weight.unflatten(1, (groups, heads, old)).movedim(0, 2)  # [groups, heads, out, d]
        blocks = self.values.unflatten(1, (groups * heads, old)).unflatten(0, (groups * heads, old))
        own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).unflatten(0, (groups, heads)).mean(1)
        maps = [maps_to((group.mT @ group).sum(0), moment, size)[1] for group, moment in zip(columns, own, strict=True)]
        every = torch.block_diag(*(each for each in maps for _ in range(heads)))
        value, value_bias = self.attention.projection("v_proj")
        rows = torch.block_diag(*maps) @ _with_bias(value, value_bias)
        return {"v_proj": _without_bias(rows, value_bias), "o_proj": (refit(weight, self.values, every), bias)}


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def _without_bias(rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (rows, None) if bias is None else (rows[:, :-1], rows[:, -1])
