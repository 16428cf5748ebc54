"""The first fit at a rank: from the first old tokens of a layer to subspaces and coefficients.

Which directions are kept is decided here, how their coefficients are stored in ``coefficients.py``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rank import Rank
from .coefficients import coefficients_for
from .compressed_tokens import CompressedTokens, HeadGroups, Heads, grouped
from .leaving_tokens import LeavingTokens
from .subspace import Scatter, Subspace, chosen_ranks
from .tile_frame import TileFrame


@dataclass(frozen=True)
class Fit:
    """How the keys, or the values, of a layer are compressed.

    Args:
        rank: a rank per head, a rule, or the rank of every group of heads.
        joint: whether all heads share one subspace.
        basis_dtype: dtype of the bases.
        dtype: dtype of the coefficients.
        subspace: a subspace that is fixed already; ``None`` fits one per group of heads.
        frame: the frame in which keys are stored; ``None`` is their own.
    """

    rank: Rank | list[int]
    joint: bool
    basis_dtype: torch.dtype
    dtype: torch.dtype
    subspace: Subspace | None = None
    frame: TileFrame | None = None

    def __call__(self, tokens: LeavingTokens, keep: Tensor | None = None, least: int = 1) -> CompressedTokens:
        """Compresses the first old tokens.

        Args:
            tokens: keys or values.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
            least: rows of the batch with fewer tokens that count get a subspace of the whole batch.
        """
        x = tokens.plain
        heads, size = x.shape[1], x.shape[3]
        together = heads if self.joint else 1
        if self.subspace is not None:
            chosen: list[tuple[Heads, Subspace]] = [(slice(None), self.subspace.to(x.device, self.basis_dtype))]
            together = self.subspace.mean.shape[2] // size
        else:
            scatter = Scatter.of(grouped(x, together), self.frame, keep=keep).pooled(least)
            rank = self.rank
            ranks = rank if isinstance(rank, list) else chosen_ranks(rank, scatter, together, "LowRankKV")
            chosen = _by_rank(scatter, ranks, self.basis_dtype)
        parts, discarded = [], 0.0
        for which, subspace in chosen:
            rows, store = grouped(x[:, which], together), coefficients_for(self.dtype)
            subspace, found = subspace.within(subspace.coefficients(rows), store.largest)
            store.append(found)
            parts.append(HeadGroups(which, size, subspace, store))
            # looking at the error breaks a compiled graph; without it the subspace is never fitted again
            lost = float("inf") if torch.compiler.is_compiling() else subspace.discarded(rows, keep=keep)
            discarded = max(discarded, lost)
        return CompressedTokens(parts, discarded)


def _by_rank(scatter: Scatter, ranks: list[int], dtype: torch.dtype) -> list[tuple[Heads, Subspace]]:
    """One subspace for all groups of heads that have the same rank."""
    if len(set(ranks)) == 1:
        return [(slice(None), scatter.fit(ranks[0], dtype))]
    groups: dict[int, list[int]] = defaultdict(list)
    for group, rank in enumerate(ranks):
        groups[rank].append(group)
    whole = scatter.fit(max(ranks), dtype)
    return [
        (
            which,
            replace(whole, basis=whole.basis[:, which, :, :rank].contiguous(), mean=whole.mean[:, which].contiguous()),
        )
        for rank, which in groups.items()
    ]
