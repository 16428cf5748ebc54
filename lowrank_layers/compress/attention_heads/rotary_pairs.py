r"""Rotary pairs: the complex numbers that queries and keys are made of under RoPE, and which of them can share a place.

Under RoPE (Su et al., 2021) two entries of a query, and of a key, are one complex number that turns with its position.
At a distance :math:`\Delta` the score is :math:`\mathrm{Re} \sum_i \bar q_i k_i e^{j \omega_i \Delta}`, so that pairs
of one frequency are entries as any others, and complex maps may leave fewer of them. Neighbouring pairs make a band,
which turns at their mean frequency. Where a band has one pair it stays or goes, as in MoDeGPT (Lin et al., 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import losses_of

LONGEST = 16
"""Most pairs in a band."""
_DISTANCES = 64


@dataclass(frozen=True)
class Band:
    """Neighbouring rotary pairs of which some stay.

    Args:
        start: the first pair.
        stop: the one after the last pair.
        rank: how many stay.
    """

    start: int
    stop: int
    rank: int

    @property
    def pairs(self) -> slice:
        """The pairs in it."""
        return slice(self.start, self.stop)


def to_pairs(rows: Tensor) -> Tensor:
    """Returns rows ``[2 p, n]``, of which RoPE turns the first half with the second, as complex ones, ``[p, n]``."""
    return torch.complex(*rows.chunk(2))


def from_pairs(pairs: Tensor) -> Tensor:
    """Inverse of :func:`to_pairs`."""
    return torch.cat([pairs.real, pairs.imag])


def pair_moment(moment: Tensor) -> Tensor:
    """Returns ``E[z z^H]``, ``[p, p]``, of the pairs of entries whose second moment is ``[2 p, 2 p]``."""
    (aa, ab), (ba, bb) = (half.chunk(2, dim=1) for half in moment.chunk(2))
    return torch.complex(aa + bb, ba - ab)


def choose_bands(readers: Tensor, moments: Tensor, frequencies: Tensor, keep: int, context: int) -> list[Band]:
    """Returns the bands, alike in all heads, that lose least.

    Args:
        readers: ``E[q q^H]`` of each head, weighted as it counts, ``[heads, p, p]``.
        moments: ``E[k k^H]`` of each head, ``[heads, p, p]``.
        frequencies: radians per position of each pair, in their order, ``[p]``.
        keep: how many pairs stay.
        context: the largest distance; distances are as frequent as their logarithms are.
    """
    return band_choices(readers, moments, frequencies, keep, context)[keep]


def band_choices(
    readers: Tensor, moments: Tensor, frequencies: Tensor, most: int, context: int
) -> dict[int, list[Band]]:
    """Returns the bands of :func:`choose_bands` for each number of pairs that stay, by dynamic programming.

    Args:
        readers: ``E[q q^H]`` of each head, weighted as it counts, ``[heads, p, p]``.
        moments: ``E[k k^H]`` of each head, ``[heads, p, p]``.
        frequencies: radians per position of each pair, in their order, ``[p]``.
        most: how many pairs stay at most.
        context: the largest distance; distances are as frequent as their logarithms are.
    """
    count, weights = len(frequencies), energies(readers, moments)
    best: list[dict[int, tuple[float, list[Band]]]] = [{0: (0.0, [])}]
    for stop in range(1, count + 1):
        found: dict[int, tuple[float, list[Band]]] = {}
        for start in range(max(0, stop - LONGEST), stop):
            pairs = slice(start, stop)
            losses = losses_of(readers[:, pairs, pairs], moments[:, pairs, pairs]).sum(0)
            losses[1:] += detuning(frequencies[pairs], weights[pairs], context)
            for rank, loss in enumerate(losses.tolist()):
                for before, (lost, bands) in best[start].items():
                    total = before + rank
                    if total <= most and (total not in found or lost + loss < found[total][0]):
                        found[total] = lost + loss, [*bands, Band(start, stop, rank)]
        best.append(found)
    return {total: bands for total, (_, bands) in best[count].items()}


def energies(readers: Tensor, moments: Tensor) -> Tensor:
    """Returns what is lost without each pair, over all heads, ``[p]``."""
    return (readers.diagonal(dim1=-2, dim2=-1).real * moments.diagonal(dim1=-2, dim2=-1).real).sum(0)


def common_frequency(frequencies: Tensor, weights: Tensor) -> Tensor:
    """Returns the frequency of a band, the weighted mean of those of its pairs."""
    weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
    return (frequencies * weights).sum() / weights.sum()


def detuning(frequencies: Tensor, weights: Tensor, context: int, common: Tensor | None = None) -> float:
    """Returns what a band loses because its pairs turn at their common frequency.

    Args:
        frequencies: radians per position of each pair.
        weights: what is lost without each pair.
        context: the largest distance.
        common: the frequency at which they turn, by default that of these weights.
    """
    common = common_frequency(frequencies, weights) if common is None else common
    angles = (frequencies - common)[:, None] * _distances(context).to(frequencies)
    return float(weights @ (2 - 2 * angles.cos()).mean(1))


def seen_means(frequencies: Tensor, context: int) -> Tensor:
    r"""Returns ``1 - |E exp(j w D)|^2``, the part of its mean that a key shows by its distance, ``[p]``.

    What all keys have in common changes no attention. The mean of a pair that hardly turns is such a part; that of one
    that turns fast tells near keys from far ones.

    Args:
        frequencies: radians per position of each pair.
        context: the largest distance.
    """
    angles = frequencies[:, None] * _distances(context).to(frequencies)
    return (1 - angles.cos().mean(1).square() - angles.sin().mean(1).square()).clamp_min(0)


def _distances(context: int) -> Tensor:
    """Distances between 1 and the largest, as frequent as their logarithms are."""
    return torch.logspace(0, math.log10(context), _DISTANCES, dtype=torch.float64)
