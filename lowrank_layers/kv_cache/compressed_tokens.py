"""Keys or values of old tokens, as coefficients in a subspace per group of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compress_kernel, decode_kernel, triton_decode
from .bit_coefficients import BitCoefficients
from .bit_subspace import bit_subspaces
from .coefficients import Coefficients
from .leaving_tokens import LeavingTokens
from .rope import TILE_FRAME
from .subspace import Scatter, Subspace
from .tile_frame import TileFrame
from .transform import Transform

Heads = slice | list[int]
JUDGED = 64
"""Least number of tokens that are judged: blocks of more than half of them have to lose much, as outliers do not."""


@dataclass(eq=False)
class HeadGroups:
    """Groups of heads that share a rank; the heads of a group lie side by side in one subspace.

    Args:
        heads: indices of the heads, group by group.
        size: number of entries of a head; the subspace is as wide as a group has heads times this.
        subspace: the subspaces of all groups.
        coefficients: the coefficients of all groups.
        judged: numbers of tokens since the last judgement of drift, and of those of them in blocks that lose much.
    """

    heads: Heads
    size: int
    subspace: Subspace
    coefficients: Coefficients
    judged: tuple[int, int] = (0, 0)

    def scores(self, rows: Tensor) -> Tensor:
        """``rows (mean + basis c)^T`` as ``((rows basis) c) + rows mean``, ``[batch, heads, q, tokens]``.

        Args:
            rows: ``[batch, heads, q, size]``.
        """
        basis, mean = self._per_head(rows.dtype)
        split = self._by_group(rows)
        inner, along = ((split @ t).flatten(2, 3) for t in (basis, mean[..., None]))
        return self.coefficients.scores(inner, along).reshape(*rows.shape[:3], -1)

    def tile_scores(self, rows: Tensor, waves: Tensor) -> Tensor:
        """As :meth:`scores` for keys in the frame of their tile: rows are turned back to each tile, keys are not.

        Args:
            rows: rotated rows, ``[batch, heads, q, size]``.
            waves: cosines and sines of the tiles' centres, as :meth:`Rotation.waves` gives them.
        """
        if decode_kernel.applies(rows, self.subspace, self.coefficients):
            return decode_kernel.tile_scores(rows, waves, self.subspace, self.coefficients)
        if (scores := triton_decode.tile_scores(rows, waves, self.subspace, self.coefficients)) is not None:
            return scores
        frame, rank = self._frame(), self.subspace.basis.shape[3]
        basis, mean = self._per_head(rows.dtype)
        offsets = frame.of_offsets(mean)
        split = self._by_group(rows)
        turned = frame.rotation.turned_back(split, torch.cat([basis, offsets], -1)[:, :, :, None])
        batch, groups, heads, count, parts, wide = turned.shape
        # [tiles, parts] @ [parts, rows * rank]
        flat = turned.permute(0, 1, 4, 2, 3, 5).reshape(batch, groups, parts, -1)
        inner, shift = (waves.to(flat.dtype) @ flat).unflatten(-1, (heads * count, wide)).split([rank, TILE_FRAME], -1)
        found = self.coefficients.tile_scores(inner, shift, TILE_FRAME)
        flat = found.transpose(2, 3).reshape(batch, groups * heads, count, -1)
        return flat[..., : self.coefficients.tokens]

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights (mean + basis c)`` as ``(weights c^T) basis^T``, ``[batch, heads, q, size]``.

        Args:
            weights: ``[batch, heads, q, tokens]``.
        """
        if decode_kernel.applies(weights, self.subspace, self.coefficients):
            return decode_kernel.mixed(weights, self.subspace, self.coefficients)
        if (values := triton_decode.mixed(weights, self.subspace, self.coefficients)) is not None:
            return values
        basis, mean = self._per_head(weights.dtype)
        split = self._by_group(weights)
        inner = self.coefficients.mixed(split.flatten(2, 3)).unflatten(2, split.shape[2:4])
        found = inner @ basis.mT + split.sum(-1, keepdim=True) * mean[..., None, :]
        flat: Tensor = found.flatten(1, 2)
        return flat

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of tokens as keys or values, ``[batch, heads, stop - start, size]``.

        Args:
            start: index of the first token.
            stop: index after the last one.
            dtype: dtype of the result.
        """
        rows = self.subspace.rows(self.coefficients.read(start, stop, dtype), start)
        split: Tensor = rows.unflatten(3, (-1, self.size)).transpose(2, 3).flatten(1, 2)
        return split

    def extend(self, tokens: LeavingTokens, limit: float | None, keep: Tensor | None = None) -> float:
        """Compresses more tokens; gives the part of their energy that is lost once the subspace is fitted again, or 0.

        Args:
            tokens: keys or values of the heads.
            limit: the subspace is fitted again where most of ``JUDGED`` tokens are in blocks that lose more than this
                part of their energy; ``None`` never fits it again.
            keep: which tokens count, ``[batch, tokens so far and these]``; ``None`` counts all.
        """
        count, held = tokens.exact.shape[2], self.coefficients.tokens
        before, these = (None, None) if keep is None else (keep[:, :held], keep[:, held:])
        looked_at = slice(0, 0 if limit is None else count)
        lost, whole = self.add(tokens, looked_at, these)
        if limit is None or not self._unlike(count, lost > limit * max(whole, 1e-30)):
            return 0.0
        self.truncate(held)
        self._refit(self._rows(tokens), before, these)
        lost, whole = self.add(tokens, looked_at, these)
        return lost / max(whole, 1e-30)

    def add(self, tokens: LeavingTokens, looked_at: slice, keep: Tensor | None = None) -> tuple[float, float]:
        """Compresses more tokens; gives their energy about the mean and in the metric that is lost, and all of it.

        Args:
            tokens: keys or values of the heads.
            looked_at: the tokens whose energy is measured.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        if keep is None and compress_kernel.applies(tokens, self.subspace, self.coefficients):
            return compress_kernel.compress(tokens, self.subspace, self.coefficients, looked_at)
        start, rows = self.coefficients.tokens, self._rows(tokens)
        self.coefficients.append(self.subspace.coefficients(rows, start))
        if looked_at.start == looked_at.stop:
            return 0.0, 0.0
        first, last = start + looked_at.start, start + looked_at.stop
        centred = self.subspace.centred(rows[:, :, looked_at], first)
        held = self.coefficients.read(first, last, torch.float32)
        left = centred - (self.subspace.columns(torch.float32) @ held).mT
        if keep is not None:
            centred, left = (x * keep[:, None, looked_at, None] for x in (centred, left))
        return float(self.subspace.energy(left)), float(self.subspace.energy(centred))

    def truncate(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        self.coefficients.truncate(tokens)
        self.judged = 0, 0

    def _unlike(self, count: int, loses_much: bool) -> bool:
        """Whether most tokens since the last judgement, of which there have to be enough, lose much."""
        seen, badly = self.judged[0] + count, self.judged[1] + count * loses_much
        self.judged = (seen, badly) if seen < JUDGED else (0, 0)
        return seen >= JUDGED and 2 * badly > seen

    def _rows(self, tokens: LeavingTokens) -> Tensor:
        return grouped(tokens.plain, self.subspace.basis.shape[2] // self.size)

    def _refit(self, rows: Tensor, before: Tensor | None, these: Tensor | None) -> None:
        """Fits the subspace to all tokens and those that come; tokens that are stored are coded again."""
        old, count = self.subspace, self.coefficients.tokens
        known = self.coefficients.read(0, count, torch.float32)
        store = self.coefficients.empty()
        if isinstance(store, BitCoefficients):
            # about the mean as it is: values keep none
            held = torch.cat([old.columns(torch.float32) @ known, old.centred(rows, count).mT], -1)
            keep = None if before is None or these is None else torch.cat([before, these], 1)
            moment = Scatter.of(held.mT, centre=False, keep=keep)
            transform = Transform.fit(old.mean, moment.covariance(), old.metric)
            ((self.subspace, store),) = bit_subspaces(transform, [store.widths], old.frame)
        else:
            scatter = Scatter.of_coefficients(old, known, before) + Scatter.of(rows, old.frame, start=count, keep=these)
            self.subspace = scatter.fit(old.basis.shape[-1], old.basis.dtype)
        found = self.subspace.coefficients(old.rows(known))
        self.subspace, found = self.subspace.within(found, store.largest)
        store.append(found)
        self.coefficients = store

    def _frame(self) -> TileFrame:
        assert self.subspace.frame is not None
        return self.subspace.frame

    def _by_group(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(1, (self.subspace.basis.shape[1], -1))
        return split

    def _per_head(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Basis ``[batch, groups, heads of a group, size, rank]``, mean ``[batch, groups, heads of a group, size]``."""
        shape = (-1, self.size)
        return self.subspace.columns(dtype).unflatten(2, shape), self.subspace.mean.to(dtype).unflatten(2, shape)


@dataclass(eq=False)
class CompressedTokens:
    """Old tokens' keys, or values, of all heads.

    Args:
        parts: the groups of heads, by rank.
        discarded: the part of the energy that the first fit did not hold, or a later one that held less.
    """

    parts: list[HeadGroups]
    discarded: float

    @property
    def heads(self) -> int:
        """Number of heads."""
        return sum(part.subspace.basis.shape[1] * part.subspace.basis.shape[2] // part.size for part in self.parts)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.parts[0].coefficients.tokens

    def scores(self, rows: Tensor) -> Tensor:
        """The product of every row with every key, ``[batch, heads, q, tokens]``.

        Args:
            rows: ``[batch, heads, q, size]``.
        """
        return self._over(lambda part, x: part.scores(x), rows)

    @property
    def frame(self) -> TileFrame | None:
        """The frame of keys that are stored in that of their tile; ``None`` for others."""
        return self.parts[0].subspace.frame

    def tile_scores(self, rows: Tensor, waves: Tensor) -> Tensor:
        """As :meth:`scores` for keys in the frame of their tile.

        Args:
            rows: rotated rows, ``[batch, heads, q, size]``.
            waves: cosines and sines of the tiles' centres, as :meth:`Rotation.waves` gives them.
        """
        return self._over(lambda part, x: part.tile_scores(x, waves), rows)

    def mixed(self, weights: Tensor) -> Tensor:
        """Weighted sums of values, ``[batch, heads, q, size]``.

        Args:
            weights: ``[batch, heads, q, tokens]``.
        """
        return self._over(lambda part, w: part.mixed(w), weights)

    def rebuilt(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """A range of tokens as keys or values, ``[batch, heads, stop - start, size]``.

        Args:
            start: index of the first token.
            stop: index after the last one.
            dtype: dtype of the result.
        """
        return self._joined([part.rebuilt(start, stop, dtype) for part in self.parts])

    def extend(self, tokens: LeavingTokens, limit: float | None, keep: Tensor | None = None) -> None:
        """Compresses more tokens.

        Args:
            tokens: keys or values of all heads.
            limit: as in :meth:`HeadGroups.extend`.
            keep: as in :meth:`HeadGroups.extend`.
        """
        for part in self.parts:
            # what a new fit loses too is no reason for the next one
            self.discarded = max(self.discarded, part.extend(tokens.of_heads(part.heads), limit, keep))

    def truncate(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        for part in self.parts:
            part.truncate(tokens)

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by rows of itself; a subspace that serves the whole batch stays.

        Args:
            change: gives the new tensor for an old one.
        """
        for part in self.parts:
            part.coefficients.over_batch(change)
            if len(part.subspace.basis) > 1:
                part.subspace = part.subspace.over_batch(change)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that is stored."""
        for index, part in enumerate(self.parts):
            for name, tensor in part.subspace.tensors():
                yield f"{index}.{name}", tensor
            for name, tensor in part.coefficients.tensors():
                yield f"{index}.{name}", tensor

    def shared_nbytes(self) -> int:
        """Bytes of what belongs to the model, and not to these tokens."""
        total = 0
        for part in self.parts:
            own = dict(part.subspace.tensors())
            names = own.keys() | {"weights"} if part.subspace.shared else {"metric"}
            own.update(part.coefficients.tensors())
            total += sum(tensor.nbytes for name, tensor in own.items() if name in names)
        return total

    def _over(self, function: Callable[[HeadGroups, Tensor], Tensor], x: Tensor) -> Tensor:
        return self._joined([function(part, x[:, part.heads]) for part in self.parts])

    def _joined(self, found: list[Tensor]) -> Tensor:
        if len(found) == 1:
            return found[0]
        order = [head for part in self.parts if isinstance(part.heads, list) for head in part.heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(found, 1)[:, back]


def grouped(x: Tensor, heads: int) -> Tensor:
    """``[batch, all heads, tokens, size]`` as ``[batch, groups, tokens, heads * size]``.

    Args:
        x: keys or values.
        heads: number of heads of a group.
    """
    rows: Tensor = x.unflatten(1, (-1, heads)).transpose(2, 3).flatten(3)
    return rows
