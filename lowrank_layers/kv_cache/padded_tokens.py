"""What a cache knows of padding: which of its tokens masks have hidden, and where the rows of its batch begin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .row_starts import RowStarts, seen_tokens


class PaddedTokens:
    """Which tokens of a cache are padding, as far as masks were seen, and where rows begin that are padded on the left.

    Args:
        first: number of tokens that a row keeps exact.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.keep: Tensor | None = None
        """Which of the tokens that a mask was seen of are no padding, ``[batch, tokens]``, once there is some."""
        self.starts: RowStarts | None = None
        """Where rows begin; ``None`` where all begin at once."""
        self.masked = 0
        """Number of tokens that a mask, or none, was seen of."""

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return 0 if self.keep is None else self.keep.nbytes

    def learn(self, mask: Tensor | None, rows: int, tokens: int) -> None:
        """Learns which of the tokens that came since the last mask are padding.

        Args:
            mask: as in :meth:`LowRankKV.hide`.
            rows: rows of the batch.
            tokens: number of tokens of the cache.
        """
        start, self.masked = self.masked, tokens
        if mask is None or mask.shape[-1] < tokens:
            return
        seen = seen_tokens(mask, start, tokens).expand(rows, -1)
        if self.keep is not None or not bool(seen.all()):
            before = self.kept(0, start) if self.keep is not None else seen.new_ones(rows, start)
            self.keep = torch.cat([before, seen], 1)

    def find_starts(self) -> None:
        """Finds where rows begin."""
        self.starts = None if self.keep is None else RowStarts.of_mask(self.keep, self.first)

    def kept(self, start: int, stop: int) -> Tensor:
        """Which tokens of a range are no padding; a mask need not have been seen of the last ones.

        Args:
            start: index of the first token.
            stop: index after the last one.
        """
        assert self.keep is not None
        part = self.keep[:, start:stop]
        return F.pad(part, (0, stop - start - part.shape[1]), value=True)

    def counting(self, start: int, stop: int) -> Tensor | None:
        """Which tokens of a range are neither padding nor among a row's first ones; ``None`` if all are so.

        Args:
            start: index of the first token.
            stop: index after the last one.
        """
        if self.keep is None:
            return None
        held = self.kept(start, stop)
        index = torch.arange(start, stop, device=held.device)
        return held if self.starts is None else held & self.starts.holds(index)

    def crop(self, tokens: int) -> None:
        """Keeps what is known of the first tokens.

        Args:
            tokens: how many.
        """
        self.masked = min(self.masked, tokens)
        self.keep = None if self.keep is None else self.keep[:, :tokens]

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the rows of the batch.

        Args:
            change: gives the new tensor for an old one.
        """
        self.keep = None if self.keep is None else change(self.keep)
        self.starts = None if self.starts is None else self.starts.over_batch(change)
