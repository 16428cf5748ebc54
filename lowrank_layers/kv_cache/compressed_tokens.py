"""Keys or values of old tokens, as coefficients in a subspace per group of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import Coefficients
from .subspace import Scatter, Subspace

Heads = slice | list[int]


@dataclass(eq=False)
class HeadGroups:
    """Groups of heads that share a rank; the heads of a group lie side by side in one subspace.

    Args:
        heads: indices of the heads, group by group.
        size: number of entries of a head; the subspace is as wide as a group has heads times this.
        subspace: the subspaces of all groups.
        coefficients: the coefficients of all groups.
    """

    heads: Heads
    size: int
    subspace: Subspace
    coefficients: Coefficients

    def scores(self, rows: Tensor) -> Tensor:
        """``rows (mean + basis c)^T`` as ``((rows basis) c) + rows mean``, ``[batch, heads, q, tokens]``.

        Args:
            rows: ``[batch, heads, q, size]``.
        """
        basis, mean = self._per_head(rows.dtype)
        split = self._by_group(rows)
        inner, along = ((split @ t).flatten(2, 3) for t in (basis, mean[..., None]))
        return self.coefficients.scores(inner, along).reshape(*rows.shape[:3], -1)

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights (mean + basis c)`` as ``(weights c^T) basis^T``, ``[batch, heads, q, size]``.

        Args:
            weights: ``[batch, heads, q, tokens]``.
        """
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
        rows = self.subspace.rows(self.coefficients.read(start, stop, dtype))
        split: Tensor = rows.unflatten(3, (-1, self.size)).transpose(2, 3).flatten(1, 2)
        return split

    def extend(self, rows: Tensor, limit: float | None) -> None:
        """Compresses more tokens.

        Args:
            rows: ``[batch, groups, tokens, width]``.
            limit: the subspace is fitted again where it discards more than this part of their energy; ``None`` never
                fits it again.
        """
        if limit is not None and self.subspace.discarded(rows) > limit:
            self._refit(rows)
        self.coefficients.append(self.subspace.coefficients(rows))

    def _refit(self, rows: Tensor) -> None:
        old, count = self.subspace, self.coefficients.tokens
        known = self.coefficients.read(0, count, torch.float32)
        scatter = Scatter.of_coefficients(old, known) + Scatter.of(rows)
        self.subspace = scatter.fit(old.basis.shape[-1], old.basis.dtype)
        # both subspaces are affine: the coefficients of mean + basis c change by a small matrix and a shift
        shift = self.subspace.coefficients(old.mean[:, :, None])
        turn = self.subspace.coefficients(self.subspace.mean.float()[:, :, None] + old.basis.float().mT)
        store = self.coefficients.empty()
        self.subspace, found = self.subspace.within(turn @ known + shift, store.largest)
        store.append(found)
        self.coefficients = store

    def _by_group(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(1, (self.subspace.basis.shape[1], -1))
        return split

    def _per_head(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Basis ``[batch, groups, heads of a group, size, rank]``, mean ``[batch, groups, heads of a group, size]``."""
        shape = (-1, self.size)
        return self.subspace.basis.to(dtype).unflatten(2, shape), self.subspace.mean.to(dtype).unflatten(2, shape)


@dataclass(eq=False)
class CompressedTokens:
    """Old tokens' keys, or values, of all heads.

    Args:
        parts: the groups of heads, by rank.
        discarded: the part of the energy that the first fit did not hold.
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

    def extend(self, x: Tensor, limit: float | None) -> None:
        """Compresses more tokens.

        Args:
            x: ``[batch, heads, tokens, size]``.
            limit: as in :meth:`HeadGroups.extend`.
        """
        for part in self.parts:
            part.extend(grouped(x[:, part.heads], part.subspace.basis.shape[2] // part.size), limit)

    def truncate(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        for part in self.parts:
            part.coefficients.truncate(tokens)

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by rows of itself; a subspace that serves the whole batch stays.

        Args:
            change: gives the new tensor for an old one.
        """
        for part in self.parts:
            part.coefficients.apply(change)
            basis, mean = part.subspace.basis, part.subspace.mean
            if len(basis) > 1:
                part.subspace = Subspace(change(basis), change(mean))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that is stored."""
        for index, part in enumerate(self.parts):
            yield f"{index}.basis", part.subspace.basis
            yield f"{index}.mean", part.subspace.mean
            for name, tensor in part.coefficients.tensors():
                yield f"{index}.{name}", tensor

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
