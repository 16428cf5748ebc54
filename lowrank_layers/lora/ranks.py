"""Which rank and alpha a layer gets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibrate.statistics import Statistics
from ..rank import Rank, check_rank, choose_rank
from .inits import Start, limit_of, spectrum_of
from .target import Place

_SHOWN = 8


def of_pattern(pattern: Mapping[str, Any] | None, place: Place, default: Any) -> Any:
    """The value for the whole name of a module or parameter, else of the first ending that fits, or the default."""
    names = [place.owner, place.name]
    for name in names:
        if pattern and name in pattern:
            return pattern[name]
    for ending, value in (pattern or {}).items():
        if any(name.endswith(f".{ending}") for name in names):
            return value
    return default


def rank_for(rank: Rank, init: str, start: Start, label: str, lowered: dict[str, int]) -> int:
    """The rank of one layer's adapter; an integer above what its matrix has is lowered, and noted."""
    check_rank(rank, f"add_lora_: {label!r}")
    limit = limit_of(init, start)
    if not isinstance(rank, int):
        return choose_rank(rank, spectrum_of(init, start, f"add_lora_: {label!r}"), limit)
    if rank > limit:
        lowered[label] = limit
    return min(rank, limit)


def note_lowered(lowered: Mapping[str, int], who: str, stacklevel: int) -> None:
    """Says which layers have a smaller rank than was asked for."""
    if lowered:
        shown = [f"{label!r} to {rank}" for label, rank in list(lowered.items())[:_SHOWN]]
        shown += [f"{len(lowered) - _SHOWN} more"] if len(lowered) > _SHOWN else []
        warnings.warn(
            f"{who}: the rank was lowered where the matrix has no more: {', '.join(shown)}; give rank_pattern= to"
            " choose it, or exclude= to leave such layers out.",
            stacklevel=stacklevel + 1,
        )


def moment_of(stats: Statistics | None, place: Place) -> Tensor | None:
    """``E[x x^T]`` of the inputs of a layer, where it was taken."""
    return None if stats is None or place.owner not in stats else stats[place.owner].inputs.second


def explained_ranks(limits: Mapping[Place, int], stats: Statistics | None, rank: int) -> dict[Place, int]:
    """EVA's ranks: the budget goes to the directions that explain most of the variance of their layer's inputs.

    Args:
        limits: the largest rank of every layer.
        stats: with the moments of their inputs.
        rank: the average.
    """
    ratios: list[tuple[float, Place]] = []
    result: dict[Place, int] = {}
    for place, limit in limits.items():
        moment = moment_of(stats, place)
        if moment is not None and moment.ndim == 2:
            values = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
            ratios += [(float(value), place) for value in (values / values.sum().clamp_min(1e-300))[:limit]]
            result[place] = 1
    ratios.sort(key=lambda pair: -pair[0])
    counts: dict[Place, int] = {}
    for _, place in ratios[: rank * len(result)]:
        counts[place] = counts.get(place, 0) + 1
    return {place: max(least, counts.get(place, 0)) for place, least in result.items()}
