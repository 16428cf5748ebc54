"""The subspace in which the keys or values of a group of heads lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rank import Rank, Spectrum, choose_rank


@dataclass(frozen=True, eq=False)
class Subspace:
    """An affine subspace per group of heads: keys or values ``x`` as ``mean + basis c``.

    Args:
        basis: ``[batch, groups, width, rank]``; a batch of one serves all rows of a batch.
        mean: ``[batch, groups, width]``.
    """

    basis: Tensor
    mean: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Subspace:
        """The same subspace elsewhere.

        Args:
            device: where it is stored.
            dtype: the dtype in which it is stored.
        """
        return Subspace(self.basis.to(device, dtype), self.mean.to(device, dtype))

    def coefficients(self, rows: Tensor) -> Tensor:
        """The least-squares ``c`` of rows, ``[batch, groups, rank, tokens]`` in fp32.

        It is solved with the basis as it is stored: rounded to fewer bits it is no longer orthonormal.

        Args:
            rows: ``[batch, groups, tokens, width]``.
        """
        basis = self.basis.float()
        centred = rows.float() - self.mean.float()[:, :, None]
        solved: Tensor = torch.linalg.solve(basis.mT @ basis, basis.mT @ centred.mT)
        return solved

    def rows(self, coefficients: Tensor) -> Tensor:
        """``mean + basis c``, ``[batch, groups, tokens, width]``, in the dtype of the coefficients.

        Args:
            coefficients: ``[batch, groups, rank, tokens]``.
        """
        each = coefficients.flatten(0, 1).mT
        shape = (len(coefficients), -1, -1)
        basis = self.basis.to(each.dtype).expand(*shape, -1).flatten(0, 1)
        mean = self.mean.to(each.dtype).expand(*shape).flatten(0, 1)
        found: Tensor = torch.baddbmm(mean[:, None], each, basis.mT).unflatten(0, coefficients.shape[:2])
        return found

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
        return Subspace(self.basis * factor, self.mean), coefficients / factor

    def discarded(self, rows: Tensor) -> float:
        """The part of the rows' energy about the mean that the subspace does not hold.

        Args:
            rows: ``[batch, groups, tokens, width]``.
        """
        centred = rows.float() - self.mean.float()[:, :, None]
        left = rows.float() - self.rows(self.coefficients(rows))
        return float(left.square().sum() / centred.square().sum().clamp_min(1e-30))


@dataclass(frozen=True, eq=False)
class Scatter:
    """What subspaces are fitted to: count, mean and centred second moment of rows.

    Args:
        count: number of rows.
        mean: ``[batch, groups, width]``.
        second: ``[batch, groups, width, width]``, not divided by the count.
    """

    count: int
    mean: Tensor
    second: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Scatter:
        """The scatter of rows.

        Args:
            rows: ``[batch, groups, tokens, width]``.
        """
        wide = rows.float()
        mean = wide.mean(2)
        centred = wide - mean[:, :, None]
        return cls(rows.shape[2], mean, centred.mT @ centred)

    @classmethod
    def of_coefficients(cls, subspace: Subspace, coefficients: Tensor) -> Scatter:
        """The scatter of rows that are known by their coefficients, without forming them.

        Args:
            subspace: the subspace in which the rows lie.
            coefficients: ``[batch, groups, rank, tokens]``.
        """
        basis, middle = subspace.basis.float(), coefficients.mean(3)
        centred = coefficients - middle[..., None]
        mean = subspace.mean.float() + (basis @ middle[..., None])[..., 0]
        return cls(coefficients.shape[3], mean, basis @ (centred @ centred.mT) @ basis.mT)

    def __add__(self, other: Scatter) -> Scatter:
        count = self.count + other.count
        apart = other.mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * other.count / count)
        return Scatter(count, self.mean + apart * (other.count / count), self.second + other.second + between)

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
        return Subspace(vectors[..., :rank].to(dtype).contiguous(), self.mean.to(dtype))


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
    sizes = range(scatter.count + width, (scatter.count + width) * width + 1, scatter.count + width)
    shape = (scatter.count, width)
    return [choose_rank(rank, Spectrum(each, shape, sizes, scatter.count * width, who), width) for each in values.cpu()]
