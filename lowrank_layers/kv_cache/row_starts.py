"""Rows of a batch that are padded: what a mask hides is no data, and a row begins with its first token that is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def seen_tokens(mask: Tensor, start: int, stop: int) -> Tensor:
    """Which tokens at least one query attends to, ``[batch, stop - start]``.

    Args:
        mask: ``[batch, 1 or query heads, q, tokens]`` or ``[batch, tokens]``: true where to attend, or what to add to
            the scores.
        start: index of the first token.
        stop: index after the last one.
    """
    part = mask[..., start:stop]
    seen = part > torch.finfo(part.dtype).min / 2 if part.is_floating_point() else part.bool()
    return seen if seen.ndim == 2 else seen.flatten(1, 2).any(1)


@dataclass(frozen=True, eq=False)
class RowStarts:
    """Where the rows of a batch begin that are padded on the left.

    A cache keeps the first tokens exact, which for such a row are those after its padding: they are stored ahead of it.
    The places where they come, and the padding, hold what nobody attends to; all other tokens keep their places.

    Args:
        index: index of each row's first token, ``[batch]``.
        first: number of tokens that are stored ahead of the padding.
        least: index of the first token of the row that begins first.
        most: index after the first tokens of the row that begins last.
    """

    index: Tensor
    first: int
    least: int
    most: int

    @classmethod
    def of(cls, index: Tensor, first: int) -> RowStarts:
        """The starts of rows.

        Args:
            index: index of each row's first token, ``[batch]``.
            first: number of tokens that are stored ahead of the padding.
        """
        return cls(index, first, int(index.min()), int(index.max()) + first)

    @classmethod
    def of_mask(cls, keep: Tensor, first: int) -> RowStarts | None:
        """The starts of rows; ``None`` where all begin at once.

        Args:
            keep: which tokens are no padding, ``[batch, tokens]``.
            first: number of tokens that are stored ahead of the padding.
        """
        index = keep.cumsum(1).eq(0).sum(1)
        return cls.of(index, first) if bool(index.any()) else None

    def positions(self, index: Tensor) -> Tensor:
        """Positions of tokens in their rows, ``[batch, 1, tokens]``.

        Args:
            index: indices of tokens in the cache, ``[tokens]``.
        """
        return index - self.index[:, None, None]

    def holds(self, index: Tensor) -> Tensor:
        """Whether places of the cache hold tokens that are attended to there, ``[batch, places]``.

        Args:
            index: indices of places beyond the first tokens.
        """
        return index >= self.index[:, None] + self.first

    def taken(self, x: Tensor) -> Tensor:
        """The rows' first tokens, ``[batch, heads, first, size]``.

        Args:
            x: keys or values from the cache's first token on, ``[batch, heads, tokens, size]``.
        """
        return x.gather(2, self._places()[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def placed(self, x: Tensor) -> Tensor:
        """Keys or values in the order in which they came, from the order in which they are stored.

        Args:
            x: ``[batch, heads, tokens, size]``.
        """
        first = x[:, :, : self.first]
        return x.scatter(2, self._places()[:, None, :, None].expand_as(first), first)

    def arranged(self, mask: Tensor) -> Tensor:
        """A mask in the order in which tokens are stored.

        Args:
            mask: ``[batch or 1, heads or 1, q, tokens]``: true where to attend, or what to add to the scores.
        """
        mask = mask.expand(len(self.index), -1, -1, -1)
        places = self._places()[:, None, None].expand(-1, *mask.shape[1:3], -1)
        index = torch.arange(self.first, mask.shape[-1], device=mask.device)
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        rest = mask[..., self.first :].masked_fill(~self.holds(index)[:, None, None], lowest)
        return torch.cat([mask.gather(3, places), rest], -1)

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> RowStarts:
        """The starts of other rows.

        Args:
            change: gives the new tensor for an old one.
        """
        return RowStarts(change(self.index), self.first, self.least, self.most)

    def _places(self) -> Tensor:
        return self.index[:, None] + torch.arange(self.first, device=self.index.device)
