"""Base class of convolutions that are factored into two."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import Tensor, nn

from ..decompose.pair import grouped_pairs, pair_factors
from ..factors import SVD, Blocks
from ..rank import Rank, choose_rank, pair_spectrum
from .conv_base import FactoredConv
from .conversion import fill
from .instance_checks import check_dense
from .kernel import factors_of_pair, kernel_of, kernel_of_matrix, matrix_of, pair_kernels, weight_of_kernel
from .weights import bias_of, meta_twin

Pair = TypeVar("Pair", bound="PairConv")


class PairConv(FactoredConv):
    """A convolution as two in a row: its kernel as a matrix, and that matrix as a product of two factors."""

    first_axes: tuple[int, ...]
    """The spatial axes of the first convolution; the second one has the others."""

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        axes = tuple(range(len(self.kernel_size)))
        self.first_axes = self._first_axes()
        rows, columns = self._matrix_shape()
        spectrum = pair_spectrum(rows, columns, None, type(self).__name__)
        inner = self.groups * choose_rank(rank, spectrum, min(rows, columns))
        second = [axis for axis in axes if axis not in self.first_axes]
        self.down = self._spatial(self.in_channels, inner, axes=self.first_axes, **factory)
        self.up = self._spatial(inner, self.out_channels, axes=second, bias=bias, **factory)

    def _first_axes(self) -> tuple[int, ...]:
        """All axes; none for a transposed convolution, whose second child has them."""
        return () if self.transposed else tuple(range(len(self.kernel_size)))

    def _matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the kernel of one group as a matrix."""
        out, into, *k = self.kernel_shape
        inner = math.prod(k[axis] for axis in self.first_axes)
        return out * math.prod(k) // inner, into * inner

    @property
    def rank(self) -> int:
        """Number of inner channels per group."""
        channels: int = self.down.out_channels  # type: ignore[assignment]
        return channels // self.groups

    @classmethod
    def from_dense(cls: type[Pair], conv: nn.Module, *, rank: Rank, **form: Any) -> Pair:
        """Factorizes a trained convolution by the truncated SVD of its kernel as a matrix, per group.

        Args:
            conv: the dense convolution.
            rank: an integer or a rank rule, which gets the root mean square of the groups' singular values.
            **form: ``mode``, where the constructor takes it.

        Raises:
            UnsupportedLayerError: if it is not the plain torch layer that this class replaces.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        check_dense(cls, conv)
        axes = cls.like(meta_twin(conv), rank=1, **form).first_axes
        matrix = matrix_of(kernel_of(conv).detach(), axes)
        lasts, firsts = grouped_pairs(matrix, rank, cls.__name__)
        return cls.from_pairs(conv, lasts, firsts, bias_of(conv), **form)

    @classmethod
    def from_pairs(
        cls: type[Pair], conv: nn.Module, lasts: Tensor, firsts: Tensor, bias: Tensor | None, **form: Any
    ) -> Pair:
        """Builds a layer like ``conv`` from factors ``[groups, rows, r]`` and ``[groups, r, columns]``."""
        layer = cls.like(conv, rank=firsts.shape[1], bias=bias is not None, **form)
        shape = (layer.groups, *layer.kernel_shape)
        last, first = pair_kernels(lasts, firsts, shape, layer.first_axes)
        children = zip(layer.parts, (first, last), strict=True)
        weights = [weight_of_kernel(k, transposed=child.transposed) for child, k in children]  # type: ignore[arg-type]
        return fill(layer, weights, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer does."""
        out: Tensor = self.up(self.down(input))
        return out

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The factors ``[groups, rows, r]`` and ``[groups, r, columns]``."""
        return factors_of_pair(kernel_of(self.up), kernel_of(self.down))

    def kernel(self) -> Tensor:
        """Multiplies out the dense kernel ``[groups, out / groups, in / groups, *k]``."""
        last, first = self._pairs()
        return kernel_of_matrix(last @ first, (self.groups, *self.kernel_shape), self.first_axes)

    def factors(self) -> SVD | Blocks:
        """The matrix that the pair multiplies to, as an SVD; with groups, one below the other.

        The matrix is the weight flattened to ``[out, in*area]``, or ``[in, out*area]`` if transposed. In spatial mode
        it is ``[out*kw, in*kh]``.
        """
        lasts, firsts = self._pairs()
        if self.transposed:
            lasts, firsts = firsts.mT, lasts.mT
        parts = [pair_factors(last, first) for last, first in zip(lasts, firsts, strict=True)]
        return parts[0] if len(parts) == 1 else Blocks(tuple(parts))
