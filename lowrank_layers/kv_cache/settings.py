"""What a user chooses about a cache, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..checks import check_integer, is_number
from ..errors import LowRankError
from ..rank import Rank, check_rank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Dtypes in which coefficients can be stored."""


@dataclass(frozen=True)
class KVSettings:
    """Settings of a low-rank key/value cache: which tokens stay exact, and how the others are stored.

    Every cache takes them as one value, ``LowRankCache(KVSettings(rank=16))``, or by name, ``LowRankCache(rank=16)``.

    Args:
        rank: number of coefficients per token and head, for keys and for values: an integer, or a rank rule that looks
            at the spectrum.
        value_rank: number of coefficients per token and head for values; ``None`` takes ``rank``.
        keep_recent: number of tokens at the end that stay exact.
        keep_first: number of tokens at the start that stay exact (attention sinks).
        joint: whether all heads share one subspace, with as many directions as their own subspaces would have together.
            A shared subspace takes as many bytes per token and loses less; its basis takes more bytes, and decoding
            more arithmetic.
        rope: ``"before"`` takes the rotary position embedding off the keys before they are compressed, and puts it on
            again where they are read: half the rank is then enough. ``"after"`` compresses rotated keys, which is
            faster.
        dtype: dtype of the coefficients; ``None`` is the one in which keys and values come. ``torch.int8`` stores one
            scale per token and group of heads beside them, and the bases in bfloat16.
        block: number of tokens that are compressed at a time.
        refresh: the subspace is fitted again when a block loses more than this many times what the first fit lost;
            ``None`` never fits it again.
        max_length: greatest number of tokens that the cache takes; ``None`` sets no limit.

    Raises:
        LowRankError: for a value that is out of range.

    Examples:
        >>> lr.KVSettings(rank=lr.Energy(0.99), dtype=torch.int8).keep_recent
        128
    """

    rank: Rank = 16
    value_rank: Rank | None = None
    keep_recent: int = 128
    keep_first: int = 4
    joint: bool = True
    rope: Literal["before", "after"] = "before"
    dtype: torch.dtype | None = None
    block: int = 64
    refresh: float | None = 2.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank, "KVSettings")
        if self.value_rank is not None:
            check_rank(self.value_rank, "KVSettings")
        for name, least in (("keep_recent", 0), ("keep_first", 0), ("block", 1)):
            check_integer(getattr(self, name), "KVSettings", name, least)
        if self.max_length is not None:
            check_integer(self.max_length, "KVSettings", "max_length", 1)
        if self.rope not in ("before", "after"):
            raise LowRankError(f"KVSettings: got rope={self.rope!r}, expected 'before' or 'after'.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"KVSettings: got dtype={self.dtype!r}, expected None or one of {list(DTYPES)}.")
        if self.refresh is not None and not (is_number(self.refresh) and self.refresh >= 1):
            raise LowRankError(
                f"KVSettings: got refresh={self.refresh!r}, expected None (never fit again) or how many times the error"
                " of the first fit a block may have, at least 1."
            )

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of bases and of coefficients.

        Args:
            dtype: dtype of the keys or values that are compressed.
        """
        chosen = dtype if self.dtype is None else self.dtype
        return (torch.bfloat16, chosen) if chosen == torch.int8 else (chosen, chosen)

    def rank_of(self, values: bool) -> Rank:
        """The rank of values, or of keys.

        Args:
            values: whether values are asked for.
        """
        return self.value_rank if values and self.value_rank is not None else self.rank
