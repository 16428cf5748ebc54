"""Rank and alpha of each adapter: patterns, rank rules, and ranks that are lowered to what a matrix has."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..rank import Rank, Spectrum, check_rank, choose_rank
from .adapted_weight import AdaptedWeight
from .inits.base import InitContext, LoRAInit

_SHOWN = 8


def warn_unmatched(patterns: Mapping[str, Mapping[str, Any] | None], weights: Iterable[AdaptedWeight]) -> None:
    """Warns of keys that fit no weight, and so have no effect.

    Args:
        patterns: the patterns by the names of their arguments.
        weights: all weights that get an adapter.
    """
    names = {name for weight in weights for name in (weight.owner, weight.name)}
    for argument, pattern in patterns.items():
        unmatched = [key for key in pattern or {} if not any(_ends(name, key) for name in names)]
        if unmatched:
            warnings.warn(
                f"add_lora_: {argument} has the keys {unmatched}, which match no layer that gets an adapter and are"
                " ignored; check their spelling, or the target.",
                stacklevel=3,
            )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def of_pattern(pattern: Mapping[str, Any] | None, weight: AdaptedWeight, default: Any) -> Any:
    """The value of a pattern for a weight, or the default.

    The whole name of its module or parameter comes first, then the first ending of one that fits.
    """
    names = [weight.owner, weight.name]
    for name in names:
        if pattern and name in pattern:
            return pattern[name]
    for ending, value in (pattern or {}).items():
        if any(name.endswith(f".{ending}") for name in names):
            return value
    return default


def rank_for(rank: Rank, init: LoRAInit, context: InitContext, lowered: dict[str, int]) -> int:
    """The rank of one weight's adapter; an integer above what its matrix has is lowered, and noted.

    Args:
        rank: what is asked for: an integer, or a rule that reads what the init takes its directions from.
        init: how the adapter starts.
        context: the weight.
        lowered: gets the name and the rank of the weight where the rank is lowered.
    """
    who = f"add_lora_: {context.weight.name!r}"
    check_rank(rank, who)
    limit = init.limit(context)
    if not isinstance(rank, int):
        return choose_rank(rank, _spectrum(init, context, who), limit)
    if rank > limit:
        lowered[context.weight.name] = limit
    return min(rank, limit)


def _spectrum(init: LoRAInit, context: InitContext, who: str) -> Spectrum:
    """What a rule reads, with the size of an adapter of every rank."""
    weight, limit = context.weight.values, context.limit
    *_, rows, columns = context.matrix.shape
    per_rank = sum(math.prod(shape) for shape in context.weight.layout.shapes(weight, 1))
    sizes = range(per_rank, per_rank * limit + 1, per_rank)
    return Spectrum(init.singular_values(context)[:limit], (rows, columns), sizes, weight.numel(), who)


def note_lowered(lowered: Mapping[str, int], who: str, stacklevel: int) -> None:
    """Warns of the layers that have a smaller rank than was asked for."""
    if lowered:
        shown = [f"{label!r} to {rank}" for label, rank in list(lowered.items())[:_SHOWN]]
        shown += [f"{len(lowered) - _SHOWN} more"] if len(lowered) > _SHOWN else []
        warnings.warn(
            f"{who}: the rank was lowered where the matrix has no more: {', '.join(shown)}; give rank_pattern= to"
            " choose it, or exclude= to leave such layers out.",
            stacklevel=stacklevel + 1,
        )
