"""What heads of each size keep, alike in all attentions where a configuration says it, and what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...calibrate.statistics import LayerStats
from ...linalg import full_precision
from ..damping import Damping
from .find import Attention
from .losses import lost_by_keys, lost_by_values
from .maps import HeadMaps
from .problem import HeadProblem
from .rotary_pairs import Band, band_choices, common_frequency, energies, seen_means


@dataclass(frozen=True)
class KeptHeads:
    """What stays of the heads of a model.

    Args:
        size: entries of a head.
        maps: the maps of each attention, by its name.
        frequencies: radians per position of each pair, ``[size / 2]``.
    """

    size: int
    maps: Mapping[str, HeadMaps]
    frequencies: Tensor


class HeadChoices:
    """The sizes that the heads of a model may have.

    Args:
        attentions: its attentions.
        frequencies: radians per position of each pair.
        stats: statistics of their projections of keys and of outputs.
        damping: ridges on moments.
        context: the largest distance of two tokens that counts.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        frequencies: Tensor,
        stats: Mapping[str, LayerStats],
        damping: Damping,
        context: int,
    ) -> None:
        self._frequencies, self._stats, self._damping, self._context = frequencies, stats, damping, context
        seen = seen_means(frequencies, context)
        self._problems = [
            HeadProblem.of(each, stats[f"{each.name}.k_proj"], stats[f"{each.name}.o_proj"], seen, damping)
            for each in attentions
        ]
        queries, keys = (
            torch.cat([getattr(each, side).to(frequencies.device) for each in self._problems])  # they may be on several
            for side in ("queries", "keys")
        )
        self._energies = energies(queries, keys)
        self._bands = band_choices(queries, keys, frequencies, len(frequencies), context)
        self._kept: dict[int, KeptHeads] = {}

    def losses(self, rank: int) -> tuple[float, ...]:
        """Returns by how much the loss grows by the keys and by the output projection of each attention.

        Args:
            rank: entries of a head.
        """
        return tuple(loss for keys, values in self._losses for loss in (sum(keys[rank]), values[rank]))

    def losses_alone(self, rank: int) -> tuple[float, ...]:
        """Returns the same while all pairs turn at their own frequencies.

        Args:
            rank: entries of a head.
        """
        return tuple(loss for keys, values in self._losses for loss in (keys[rank][0], values[rank]))

    @full_precision
    def kept(self, rank: int) -> KeptHeads:
        """Returns what stays.

        Args:
            rank: entries of a head.
        """
        if rank not in self._kept:
            bands = self._bands[rank // 2]
            common = [self._common(band).expand(band.rank) for band in bands]
            maps = {each.attention.name: each.maps(bands, rank) for each in self._problems}
            self._kept[rank] = KeptHeads(rank, maps, torch.cat(common))
        return self._kept[rank]

    @cached_property
    @full_precision
    def _losses(self) -> list[tuple[dict[int, tuple[float, float]], dict[int, float]]]:
        """What keys lose at each size, by fewer pairs and by their frequencies, and what values do, by attention."""
        found = []
        sizes = [2 * pairs for pairs in sorted(self._bands) if pairs]
        for problem in self._problems:
            maps = {size: problem.maps(self._bands[size // 2], size) for size in sizes}
            bands = {size: [(band, self._common(band)) for band in self._bands[size // 2]] for size in sizes}
            name, damping = problem.attention.name, self._damping
            keys = lost_by_keys(
                problem, self._stats[f"{name}.k_proj"], damping, maps, bands, self._frequencies, self._context
            )
            found.append((keys, lost_by_values(problem, self._stats[f"{name}.o_proj"], damping, maps)))
        return found

    def _common(self, band: Band) -> Tensor:
        """The frequency at which the pairs of a band turn."""
        return common_frequency(self._frequencies[band.pairs], self._energies[band.pairs])
