"""What a user chooses about a cache, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import LowRankError
from ..rank import Rank, check_rank

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class KVSettings:
    """What a low-rank cache keeps exact, and how it stores the rest.

    Args:
        rank: coefficients a token and head, of keys and of values: an integer, or a rule that looks at the spectrum.
        value_rank: of values, where it differs.
        keep_recent: exact tokens at the end.
        keep_first: exact tokens at the start (attention sinks).
        joint: whether the heads share one subspace, of as many directions as theirs would have together: as many bytes
            a token, and better; the bases take more bytes, and decoding more arithmetic.
        rope: ``"before"`` takes the rotation off before it compresses keys (half the rank does, and the rotation is put
            on again tile by tile), ``"after"`` compresses them as they come (faster).
        dtype: of the coefficients; ``None`` is that of the keys, ``torch.int8`` has a scale a token and group of heads,
            with bases in bfloat16.
        block: tokens that are compressed at a time.
        refresh: fits the subspace again when a block loses more than this many times what the first fit lost; ``None``
            never does.
        max_length: more tokens are refused.

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
        check_rank(self.rank, "LowRankKV")
        if self.value_rank is not None:
            check_rank(self.value_rank, "LowRankKV")
        for what, least in (("keep_recent", 0), ("keep_first", 0), ("block", 1)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LowRankError(f"LowRankKV: got {what}={value!r}, expected an integer of at least {least}.")
        if self.max_length is not None and (isinstance(self.max_length, bool) or self.max_length < 1):
            raise LowRankError(f"LowRankKV: got max_length={self.max_length!r}, expected a positive number of tokens.")
        if self.rope not in ("before", "after"):
            raise LowRankError(f"LowRankKV: got rope={self.rope!r}, expected 'before' or 'after'.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"LowRankKV: got dtype={self.dtype!r}, expected None or one of {list(DTYPES)}.")
        if self.refresh is not None and not self.refresh >= 1:
            raise LowRankError(
                f"LowRankKV: got refresh={self.refresh!r}, expected None (never) or how many times the error of the"
                " first fit a block may have, at least 1."
            )

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Of bases and of coefficients, for a cache of that dtype."""
        stored = dtype if self.dtype is None else self.dtype
        return (torch.bfloat16, stored) if stored == torch.int8 else (stored, stored)

    def rank_of(self, values: bool) -> Rank:
        """Of keys, or of values."""
        return self.value_rank if values and self.value_rank is not None else self.rank
