"""The subspace in which the keys or values of a group of heads lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..rank import Rank, Spectrum, choose_rank
from .moment_kernel import second_moment
from .tile_frame import TileFrame


@dataclass(frozen=True, eq=False)
class Subspace:
    """An affine subspace per group of heads: keys or values ``x`` as ``mean + basis c``.

    Args:
        basis: ``[batch, groups, width, rank]``; a batch of one serves all rows of a batch.
        mean: ``[batch, groups, width]``.
        scale: factors of the columns of the basis, ``[batch, groups, rank]``; ``None`` stands for ones.
        metric: the metric in which rows are projected, ``[1, groups, width, width]``; ``None`` is the identity.
        frame: the frame in which keys lie in the subspace, once the mean is taken off; ``None`` is their own.
        shared: whether it is the model's, and takes no bytes of a sequence.
    """

    basis: Tensor
    mean: Tensor
    scale: Tensor | None = None
    metric: Tensor | None = None
    frame: TileFrame | None = None
    shared: bool = False

    def __deepcopy__(self, memo: object) -> Subspace:
        return self  # nothing in it is ever written to

    def to(self, device: torch.device, dtype: torch.dtype) -> Subspace:
        """The same subspace elsewhere.

        Args:
            device: where it is stored.
            dtype: the dtype in which basis and mean are stored.
        """
        return replace(self, basis=self.basis.to(device, dtype), mean=self.mean.to(device, dtype))

    def columns(self, dtype: torch.dtype) -> Tensor:
        """The basis with its scale, ``[batch, groups, width, rank]``.

        Args:
            dtype: dtype of the result.
        """
        basis = self.basis.to(dtype)
        return basis if self.scale is None else basis * self.scale[:, :, None].to(dtype)

    def coefficients(self, rows: Tensor, start: int = 0) -> Tensor:
        """The least-squares ``c`` of rows, ``[batch, groups, rank, tokens]`` in fp32.

        It is solved with the basis as it is stored: rounded to fewer bits it is no longer orthonormal.

        Args:
            rows: ``[batch, groups, tokens, width]``.
            start: index of the first token, counted from the start of a tile.
        """
        found: Tensor = self.analysis() @ self.centred(rows, start).mT
        return found

    def analysis(self) -> Tensor:
        """What takes centred rows to coefficients, ``[batch, groups, rank, width]``."""
        return self._analysis if self.shared else self._solved()

    @cached_property
    def _analysis(self) -> Tensor:
        """Kept where it is the model's."""
        return self._solved()

    def _solved(self) -> Tensor:
        basis = self.columns(torch.float32)
        dual = (basis if self.metric is None else self.metric @ basis).mT
        solved: Tensor = torch.linalg.solve(dual @ basis, dual)
        return solved.contiguous()  # it comes column by column

    def centred(self, rows: Tensor, start: int = 0) -> Tensor:
        """Rows without the mean, in the frame of the subspace and in fp32.

        Args:
            rows: ``[batch, groups, tokens, width]``.
            start: index of the first token.
        """
        centred = rows.float() - self.mean.float()[:, :, None]
        return centred if self.frame is None else self.frame.into(centred, start)

    def rows(self, coefficients: Tensor, start: int = 0) -> Tensor:
        """``mean + basis c``, ``[batch, groups, tokens, width]``, in the dtype of the coefficients.

        Args:
            coefficients: ``[batch, groups, rank, tokens]``.
            start: index of the first token.
        """
        each = coefficients.flatten(0, 1).mT
        shape = (len(coefficients), -1, -1)
        basis = self.columns(each.dtype).expand(*shape, -1).flatten(0, 1)
        if self.frame is None:
            mean = self.mean.to(each.dtype).expand(*shape).flatten(0, 1)[:, None]
            found: Tensor = torch.baddbmm(mean, each, basis.mT).unflatten(0, coefficients.shape[:2])
            return found
        turned: Tensor = (each @ basis.mT).unflatten(0, coefficients.shape[:2])
        return self.frame.out_of(turned, start) + self.mean.to(each.dtype)[:, :, None]

    def energy(self, rows: Tensor) -> Tensor:
        """The sum of the squares of centred rows, in the metric.

        Args:
            rows: ``[batch, groups, tokens, width]``.
        """
        return (rows * (rows if self.metric is None else rows @ self.metric)).sum()

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> Subspace:
        """The subspace of other rows of the batch.

        Args:
            change: gives the new tensor for an old one.
        """
        scale = None if self.scale is None else change(self.scale)
        return replace(self, basis=change(self.basis), mean=change(self.mean), scale=scale)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is stored."""
        for name in ("basis", "mean", "scale", "metric"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def within(self, coefficients: Tensor, largest: float) -> tuple[Subspace, Tensor]:
        """The same subspace with a longer basis, and coefficients of which none is greater than ``largest``.

        A coefficient sums the squares of all heads' entries: those of finite rows need not be finite in fp16.

        Args:
            coefficients: ``[batch, groups, rank, tokens]``.
            largest: greatest absolute value that is allowed.
        """
        if torch.compiler.is_compiling() or not coefficients.numel():
            return self, coefficients
        peak = float(coefficients.abs().amax())
        if peak <= largest:
            return self, coefficients
        factor = 2.0 ** math.ceil(math.log2(peak / largest))
        return replace(self, basis=self.basis * factor), coefficients / factor

    def discarded(self, rows: Tensor, start: int = 0, keep: Tensor | None = None) -> float:
        """The part of the rows' energy about the mean that the subspace does not hold.

        Args:
            rows: ``[batch, groups, tokens, width]``.
            start: index of the first token.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        centred = rows.float() - self.mean.float()[:, :, None]
        left = rows.float() - self.rows(self.coefficients(rows, start), start)
        if keep is not None:
            centred, left = (x * keep[:, None, :, None] for x in (centred, left))
        return float(left.square().sum() / centred.square().sum().clamp_min(1e-30))


@dataclass(frozen=True, eq=False)
class Scatter:
    """What subspaces are fitted to: count, mean and centred second moment of rows.

    Args:
        count: number of rows, or ``[batch, 1, 1]`` where it differs over the batch.
        mean: ``[batch, groups, width]``.
        second: ``[batch, groups, width, width]``, not divided by the count.
        frame: the frame in which the second moment is; ``None`` is the rows' own.
    """

    count: int | Tensor
    mean: Tensor
    second: Tensor
    frame: TileFrame | None = None

    @classmethod
    def of(
        cls,
        rows: Tensor,
        frame: TileFrame | None = None,
        *,
        start: int = 0,
        centre: bool = True,
        keep: Tensor | None = None,
    ) -> Scatter:
        """The scatter of rows.

        Args:
            rows: ``[batch, groups, tokens, width]``.
            frame: the frame in which the second moment is taken; ``None`` is the rows' own.
            start: index of the first token, counted from the start of a tile.
            centre: whether the mean is taken off; otherwise it counts as zero.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        wide = rows.float()
        count: int | Tensor = rows.shape[2]
        if keep is None:
            mean = wide.mean(2) if centre else torch.zeros_like(wide[:, :, 0])
            centred = wide - mean[:, :, None] if centre else wide
        else:
            weights = keep[:, None, :, None].float()
            count = weights.sum(2)
            mean = (wide * weights).sum(2) / count.clamp_min(1) if centre else torch.zeros_like(wide[:, :, 0])
            centred = (wide - mean[:, :, None]) * weights
        if frame is not None:
            centred = frame.into(centred, start)
        return cls(count, mean, second_moment(centred), frame)

    @classmethod
    def of_coefficients(cls, subspace: Subspace, coefficients: Tensor, keep: Tensor | None = None) -> Scatter:
        """The scatter of rows that are known by their coefficients, without forming them.

        Args:
            subspace: the subspace in which the rows lie.
            coefficients: ``[batch, groups, rank, tokens]``.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        basis = subspace.columns(torch.float32)
        if subspace.frame is not None:  # the mean of keys in their tiles' frames is no mean of keys: it stays
            inner = cls.of(coefficients.mT, centre=False, keep=keep)
            return cls(inner.count, subspace.mean.float(), basis @ inner.second @ basis.mT, subspace.frame)
        inner = cls.of(coefficients.mT, keep=keep)
        mean = subspace.mean.float() + (basis @ inner.mean[..., None])[..., 0]
        return cls(inner.count, mean, basis @ inner.second @ basis.mT)

    def __add__(self, other: Scatter) -> Scatter:
        count, apart = self.count + other.count, other.mean - self.mean
        # a row of the batch may have none
        part = other.count / (count.clamp_min(1) if isinstance(count, Tensor) else count)
        between = apart[..., :, None] * (apart * self.count * part)[..., None, :]
        if self.frame is not None:
            between = self.frame.average(between)
        return Scatter(count, self.mean + apart * part, self.second + other.second + between, self.frame)

    def pooled(self, least: int) -> Scatter:
        """The same, but rows of the batch with too few tokens of their own get those of the whole batch.

        Args:
            least: number of tokens that are enough.
        """
        if isinstance(self.count, int):
            return self
        total = self.count.sum(0, keepdim=True)
        mean = (self.count * self.mean).sum(0, keepdim=True) / total.clamp_min(1)
        apart = self.mean - mean
        between = (self.count * apart)[..., :, None] * apart[..., None, :]
        if self.frame is not None:
            between = self.frame.average(between)
        whole, few = (self.second + between).sum(0, keepdim=True), self.count < least
        return Scatter(
            torch.where(few, total, self.count),
            torch.where(few, mean, self.mean),
            torch.where(few[..., None], whole, self.second),
            self.frame,
        )

    def covariance(self) -> Tensor:
        """The second moment, divided by the count."""
        if isinstance(self.count, int):
            return self.second / self.count
        return self.second / self.count.clamp_min(1)[..., None]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, largest first, and their vectors as columns."""
        # wide ones in fp32: their vectors have to span, not to be exact
        second = self.second if self.second.shape[-1] > 256 else self.second.double()
        values, vectors = torch.linalg.eigh(second)
        return values.flip(-1).clamp_min(0), vectors.flip(-1)

    def fit(self, rank: int, dtype: torch.dtype) -> Subspace:
        """The best subspace of a rank.

        Args:
            rank: number of directions.
            dtype: the dtype in which the subspace is stored.
        """
        _, vectors = self.spectrum()
        return Subspace(vectors[..., :rank].to(dtype).contiguous(), self.mean.to(dtype), frame=self.frame)


def chosen_ranks(rank: Rank, scatter: Scatter, heads: int, who: str) -> list[int]:
    """The rank of every group of heads; rows of a batch are looked at together.

    Args:
        rank: a rank per head, or a rule.
        scatter: what the subspaces will be fitted to.
        heads: number of heads of a group.
        who: the function or class that was given the rank, for messages.
    """
    if isinstance(rank, int):
        return [rank * heads] * scatter.mean.shape[1]
    width = scatter.mean.shape[-1]
    values = scatter.spectrum()[0].mean(0).sqrt()
    count = scatter.count if isinstance(scatter.count, int) else int(scatter.count.max())
    sizes = range(count + width, (count + width) * width + 1, count + width)
    return [
        choose_rank(rank, Spectrum(each, (count, width), sizes, count * width, who), width) for each in values.cpu()
    ]
