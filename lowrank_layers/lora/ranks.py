"""Which rank and alpha a layer gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..moments import Statistics
from .target import Place


def of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first ending that fits, or the default."""
    for ending, value in (pattern or {}).items():
        if name == ending or name.endswith(f".{ending}"):
            return value
    return default


def moment_of(stats: Statistics | None, place: Place) -> Tensor | None:
    """``E[x x^T]`` of the inputs of a layer, where it was taken."""
    return None if stats is None or place[0] not in stats else stats[place[0]].inputs.second


def explained_ranks(places: Iterable[Place], stats: Statistics | None, rank: int) -> dict[Place, int]:
    """EVA's ranks: the budget goes to the directions that explain most of the variance of their layer's inputs."""
    ratios: list[tuple[float, Place]] = []
    result: dict[Place, int] = {}
    for place in places:
        moment = moment_of(stats, place)
        if moment is not None and moment.ndim == 2:
            values = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
            ratios += [(float(value), place) for value in values / values.sum().clamp_min(1e-300)]
            result[place] = 1
    ratios.sort(key=lambda pair: -pair[0])
    counts: dict[Place, int] = {}
    for _, place in ratios[: rank * len(result)]:
        counts[place] = counts.get(place, 0) + 1
    return {place: max(least, counts.get(place, 0)) for place, least in result.items()}
