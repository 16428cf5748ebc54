"""From the first old tokens to subspaces and coefficients."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from ..rank import Rank
from .coefficients import MOST, Coefficients
from .compressed_tokens import Heads, Latent, Part, grouped
from .settings import KVSettings
from .subspace import Scatter, Subspace, chosen_ranks


def fit_latent(
    x: Tensor,
    settings: KVSettings,
    dtype: torch.dtype,
    given: Subspace | None = None,
    ranks: list[int] | None = None,
    *,
    values: bool,
) -> Latent:
    """Keys or values ``[batch, heads, tokens, size]`` at the rank that was asked for.

    Args:
        x: in fp32, keys without their rotation.
        settings: the rank and the dtypes.
        dtype: of the cache.
        given: a subspace that is fixed already.
        ranks: of every group, where they are chosen already.
        values: whether these are values.
    """
    heads, size = x.shape[1], x.shape[3]
    together = heads if settings.joint else 1
    in_bases, in_coefficients = settings.dtypes(dtype)
    if given is not None:
        chosen: list[tuple[Heads, Subspace]] = [(slice(None), given.to(x.device, in_bases))]
        together = given.mean.shape[2] // size
    else:
        scatter = Scatter.of(grouped(x, together))
        chosen = _by_rank(scatter, ranks or _ranks(settings.rank_of(values), scatter, together), in_bases)
    parts, left = [], 0.0
    for which, subspace in chosen:
        rows = grouped(x[:, which], together)
        subspace, coefficients = subspace.within(subspace.coefficients(rows), MOST.get(in_coefficients, math.inf))
        parts.append(Part(which, size, subspace, Coefficients(coefficients, in_coefficients)))
        # looking at the error breaks a compiled graph; without it the subspace is never fitted again
        left = float("inf") if torch.compiler.is_compiling() else max(left, subspace.discarded(rows))
    return Latent(parts, left)


def _ranks(rank: Rank, scatter: Scatter, together: int) -> list[int]:
    """Of every group; an integer is meant a head."""
    if isinstance(rank, int):
        return [rank * together] * scatter.mean.shape[1]
    return chosen_ranks(rank, scatter, "LowRankKV")


def _by_rank(scatter: Scatter, ranks: list[int], dtype: torch.dtype) -> list[tuple[Heads, Subspace]]:
    """One subspace for all groups of a rank."""
    if len(set(ranks)) == 1:
        return [(slice(None), scatter.fit(ranks[0], dtype))]
    groups: dict[int, list[int]] = defaultdict(list)
    for group, rank in enumerate(ranks):
        groups[rank].append(group)
    whole = scatter.fit(max(ranks), dtype)
    return [
        (which, Subspace(whole.basis[:, which, :, :rank].contiguous(), whole.mean[:, which].contiguous()))
        for rank, which in groups.items()
    ]
