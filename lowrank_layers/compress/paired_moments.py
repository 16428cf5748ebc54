"""Moments of a layer's inputs in two models, taken together row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.moments import Moments, add_to_mean_
from ..calibrate.processes import Processes
from ..calibrate.readable import Readable
from ..linalg import is_finite

Sums = tuple[Tensor, Tensor]
"""The sums of rows and of their products."""
_PART = 1024
"""Rows of a moment that are brought into another dtype at once."""


@dataclass(frozen=True)
class Recentred:
    """A moment about other centres, ``A - left^T right``, which is never formed.

    Args:
        moment: ``A``, ``[n, n]``, in any dtype.
        left: ``[2, n]``.
        right: ``[2, n]``.
    """

    moment: Tensor
    left: Tensor
    right: Tensor

    def after(self, rows: Tensor) -> Tensor:
        """Returns the rows times it.

        Args:
            rows: ``[k, n]``, in the dtype of ``left``.
        """
        product = (rows @ self.left.mT).neg_() @ self.right
        for part, own in zip(rows.split(_PART, 1), self.moment.split(_PART), strict=True):
            product.addmm_(part, own.to(rows))
        return product

    def add_to_(self, other: Tensor, alpha: float) -> Tensor:
        """Adds a multiple of it to a matrix, in place, and returns that.

        Args:
            other: the matrix.
            alpha: the factor.
        """
        for own, part in zip(other.split(_PART), self.moment.split(_PART), strict=True):
            own.add_(part, alpha=alpha)
        return other.addmm_(self.left.mT, self.right, alpha=-alpha)


@dataclass
class PairedMoments:
    """Running moments of inputs ``x'`` behind the compressed prefix and of ``x`` in the dense model.

    Args:
        inputs: ``E[x']`` and ``E[x' x'^T]``.
        cross: ``E[x x'^T]``.
        target_mean: ``E[x]``.
    """

    inputs: Moments
    cross: Readable[Tensor] = Readable()
    target_mean: Readable[Tensor] = Readable()

    @classmethod
    def before_any(cls, inputs: Moments, dtype: torch.dtype | None = None) -> PairedMoments:
        """Returns moments of the sizes of others, before any row was seen.

        Args:
            inputs: the others.
            dtype: their dtype; ``None`` is that of the others.
        """
        own = inputs.before_any()
        if dtype is not None:
            own = Moments(own.mean.to(dtype), own.second.to(dtype))
        return cls(own, torch.zeros_like(own.second), torch.zeros_like(own.mean))

    def add(self, ours: Sums, across: Sums, count: int) -> None:
        """Adds rows.

        Args:
            ours: the sums of ``x'`` and of ``x' x'^T``.
            across: the sums of ``x`` and of ``x x'^T``.
            count: how many rows.
        """
        self.inputs.add(*ours, count)
        if count:
            add_to_mean_(self.target_mean, across[0], count, self.inputs.rows)
            add_to_mean_(self.cross, across[1], count, self.inputs.rows)

    def average_(self, processes: Processes) -> None:
        """Makes them the moments of the rows of all processes.

        Args:
            processes: the processes, which all call this.
        """
        means = (self.inputs.mean, self.inputs.second, self.target_mean, self.cross)
        self.inputs.rows = processes.average_(means, self.inputs.rows)

    @property
    def is_finite(self) -> bool:
        """Whether no product is NaN or infinite."""
        return is_finite(self.cross) and is_finite(self.inputs.second)

    def about(self, mean: Tensor, target_mean: Tensor) -> tuple[Recentred, Recentred]:
        """Returns ``E[(x' - m)(x' - m)^T]`` and ``E[(x - t)(x' - m)^T]`` of one group, in the dtype of ``m``.

        Args:
            mean: ``m``.
            target_mean: ``t``.
        """
        own, target = self.inputs.mean.to(mean), self.target_mean.to(mean)
        return (
            Recentred(self.inputs.second, torch.stack([own - mean, mean]), torch.stack([mean, own])),
            Recentred(self.cross, torch.stack([target - target_mean, target_mean]), torch.stack([mean, own])),
        )

    def group(self, index: int) -> PairedMoments:
        """Returns those of one group of a grouped convolution.

        Args:
            index: the group.
        """
        if self.target_mean.ndim == 1:
            return self
        return PairedMoments(self.inputs.group(index), self.cross[index], self.target_mean[index])
