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


DEFAULT_BITS = 3.0
"""Mean bits per entry where neither bits nor a rank are given."""
DEFAULT_RANK = 16
"""The rank where only the rank of values or a dtype is given."""
JOINT_ENTRIES = 256
"""Heads with more entries together than this have directions of their own with bits, unless the settings say else."""


@dataclass(frozen=True)
class KVSettings:
    """Settings of a low-rank key/value cache: which tokens stay exact, and how the others are stored.

    Old keys and values are stored by their coefficients along the directions of greatest variance. With ``bits``, which
    is the default, each direction gets 8, 4, 3, 2, 1 or no bits, as its variance is worth (transform coding). With
    ``rank`` the first directions get all bits of a dtype, and the others none. Every cache takes the settings as one
    value, ``LowRankCache(KVSettings(bits=2))``, or by name, ``LowRankCache(bits=2)``.

    Args:
        rank: number of coefficients per token and head, for keys and for values: an integer, or a rank rule that looks
            at the spectrum; ``None`` is 16 where ``value_rank`` or ``dtype`` is given, and otherwise leaves it to
            ``bits``.
        value_rank: number of coefficients per token and head for values; ``None`` takes ``rank``.
        bits: mean number of bits per entry of old keys and values, in (0, 8]; ``None`` is 3 where no rank is given.
        keep_recent: number of tokens at the end that stay exact; ``None`` is 16 with bits, and 128 with a rank.
        keep_first: number of tokens at the start that stay exact (attention sinks).
        joint: whether all heads share one subspace, with as many directions as their own subspaces would have together.
            A shared subspace takes as many bytes per token and loses less; its basis takes more bytes, and decoding
            takes as many times the arithmetic as there are heads. ``None`` shares with a rank, and with bits where the
            heads have at most 256 entries together, as 4 heads of 64 have: above that decoding would take longer than
            from exact keys and values.
        rope: ``"before"`` takes the rotary position embedding off the keys before they are compressed, and puts it on
            again where they are read: half the rank is then enough. ``"after"`` compresses rotated keys, which is
            faster. ``"tile"`` compresses keys that are rotated by the position of the middle of 32 tokens: it loses
            little more than ``"before"``, and nothing is rotated where keys are read. ``None`` is ``"tile"`` with bits
            and ``"before"`` with a rank.
        dtype: dtype of the coefficients with a rank; ``None`` is the one in which keys and values come. ``torch.int8``
            stores one scale per token and group of heads beside them, and the bases in bfloat16.
        block: number of tokens that are compressed at a time; ``None`` is 64, and 4 with bits on a CPU, where few
            tokens are compressed in one compiled call.
        refresh: the subspace is fitted again when most of 64 tokens are in blocks that lose more than this many times
            what the last fit lost; ``None`` never fits it again.
        max_length: greatest number of tokens that the cache takes; ``None`` sets no limit.

    Raises:
        LowRankError: for a value that is out of range, or both bits and a rank.

    Examples:
        >>> lr.KVSettings(rank=lr.Energy(0.99), dtype=torch.int8).recent
        128
        >>> lr.KVSettings(bits=2).recent
        16
    """

    rank: Rank | None = None
    value_rank: Rank | None = None
    bits: float | None = None
    keep_recent: int | None = None
    keep_first: int = 4
    joint: bool | None = None
    rope: Literal["before", "after", "tile"] | None = None
    dtype: torch.dtype | None = None
    block: int | None = None
    refresh: float | None = 2.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        for rank in (self.rank, self.value_rank):
            if rank is not None:
                check_rank(rank, "KVSettings")
        self._check_bits()
        for name, least in (("keep_recent", 0), ("keep_first", 0), ("block", 1), ("max_length", 1)):
            if name == "keep_first" or getattr(self, name) is not None:
                check_integer(getattr(self, name), "KVSettings", name, least)
        if self.rope not in (None, "before", "after", "tile"):
            raise LowRankError(f"KVSettings: got rope={self.rope!r}, expected 'before', 'after' or 'tile'.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"KVSettings: got dtype={self.dtype!r}, expected None or one of {list(DTYPES)}.")
        if self.refresh is not None and not (is_number(self.refresh) and self.refresh >= 1):
            raise LowRankError(
                f"KVSettings: got refresh={self.refresh!r}, expected None (never fit again) or how many times the error"
                " of the first fit a block may have, at least 1."
            )

    def _check_bits(self) -> None:
        if self.bits is None:
            return
        if not (is_number(self.bits) and 0 < self.bits <= 8):
            raise LowRankError(f"KVSettings: got bits={self.bits!r}, expected a mean number of bits in (0, 8].")
        for name in ("rank", "value_rank", "dtype"):
            if (given := getattr(self, name)) is not None:
                raise LowRankError(
                    f"KVSettings: got bits={self.bits!r} and {name}={given!r}, expected bits, or a rank and a dtype."
                )

    @property
    def by_rank(self) -> bool:
        """Whether a rank is kept in one dtype, rather than bits by direction."""
        return not (self.rank is None and self.value_rank is None and self.dtype is None)

    @property
    def mean_bits(self) -> float:
        """Mean number of bits per entry, where no rank is kept."""
        return DEFAULT_BITS if self.bits is None else self.bits

    @property
    def recent(self) -> int:
        """Number of tokens at the end that stay exact."""
        return (128 if self.by_rank else 16) if self.keep_recent is None else self.keep_recent

    @property
    def at_first(self) -> int:
        """Least number of tokens that are compressed for the first time, and that directions are fitted to."""
        return (64 if self.by_rank else 16) if self.block is None else self.block

    def block_on(self, device: torch.device) -> int:
        """Number of tokens that are compressed at a time.

        Args:
            device: where they are.
        """
        if self.block is not None:
            return self.block
        return 4 if device.type == "cpu" and not self.by_rank else 64

    @property
    def rotated(self) -> str:
        """How keys are rotated when they are compressed: ``"before"``, ``"after"`` or ``"tile"``."""
        return ("before" if self.by_rank else "tile") if self.rope is None else self.rope

    def together(self, heads: int, size: int) -> int:
        """Number of heads that share one subspace: all of them, or one.

        Args:
            heads: heads of keys or values.
            size: entries per head.
        """
        shared = self.by_rank or heads * size <= JOINT_ENTRIES if self.joint is None else self.joint
        return heads if shared else 1

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of bases and of coefficients, with a rank.

        Args:
            dtype: dtype of the keys or values that are compressed.
        """
        chosen = dtype if self.dtype is None else self.dtype
        return (torch.bfloat16, chosen) if chosen == torch.int8 else (chosen, chosen)

    def rank_of(self, values: bool) -> Rank:
        """The rank of values, or of keys, where a rank is kept.

        Args:
            values: whether values are asked for.
        """
        rank = DEFAULT_RANK if self.rank is None else self.rank
        return self.value_rank if values and self.value_rank is not None else rank
