"""Convolutions in CP form: sums of separable kernels (canonical polyadic decomposition)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..decompose import cp
from ..decompose.cp import cp_refit
from ..decompose.ranks import cp_rank
from ..factors import CP, Blocks
from ..rank import Rank
from .conv_base import FactoredConv, TransposedConv
from .conversion import fill
from .instance_checks import check_dense
from .kernel import kernel_of
from .weights import bias_of

Conv = TypeVar("Conv", bound="CPConv")
AXES = {1: ("horizontal",), 2: ("vertical", "horizontal"), 3: ("depth", "vertical", "horizontal")}
"""Names of the depthwise children by number of spatial dimensions, in the order they run."""
_LETTERS = "dhw"


class CPConv(FactoredConv):
    """A convolution in CP form: pointwise, one depthwise convolution per axis, pointwise."""

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        inner = self.groups * cp_rank(rank, self.kernel_shape, type(self).__name__)
        self.reduce = self._pointwise(self.in_channels, inner, **factory)
        for axis, name in enumerate(AXES[len(self.kernel_size)]):
            setattr(self, name, self._spatial(inner, inner, axes=(axis,), groups=inner, **factory))
        self.expand = self._pointwise(inner, self.out_channels, bias=bias, **factory)

    @property
    def rank(self) -> int:
        """Number of components per group."""
        return kernel_of(self.reduce).shape[1]

    @classmethod
    def from_dense(cls: type[Conv], conv: nn.Module, *, rank: Rank) -> Conv:
        """Factorizes a trained convolution by alternating least squares, per group.

        Args:
            conv: the dense convolution.
            rank: an integer, ``ParameterFraction``, ``RankFraction``, or without groups a rule that looks at CP
                decompositions of several ranks, such as ``FactorMatch``.

        Raises:
            UnsupportedLayerError: if it is not the plain torch layer that this class replaces.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        check_dense(cls, conv)
        kernels = kernel_of(conv).detach()
        refit = (lambda: cp_refit(kernels[0])) if len(kernels) == 1 else None
        chosen = cp_rank(rank, tuple(kernels.shape[1:]), cls.__name__, refit)
        return cls.from_parts(conv, [cp(kernel, chosen) for kernel in kernels])

    @classmethod
    def from_parts(cls: type[Conv], conv: nn.Module, parts: Sequence[CP]) -> Conv:
        """Builds a layer like ``conv`` from the CP decomposition of each group's ``[out, in, *k]``."""
        matrices = [torch.stack(modes) for modes in zip(*(part.balanced() for part in parts), strict=True)]
        return cls.from_matrices(conv, matrices, bias_of(conv))

    @classmethod
    def from_matrices(cls: type[Conv], conv: nn.Module, matrices: Sequence[Tensor], bias: Tensor | None) -> Conv:
        """Builds a layer like ``conv`` from matrices ``[groups, n, rank]`` for out, in and each axis."""
        expand, reduce, *axes = matrices
        layer = cls.like(conv, rank=reduce.shape[2], bias=bias is not None)
        return fill(layer, [reduce.mT, *(axis.mT for axis in axes), expand], bias)

    def _matrices(self) -> list[Tensor]:
        """The factors ``[groups, n, rank]`` for out, in and each axis."""
        reduce, *axes, expand = (kernel_of(child) for child in self.parts)
        thin = [axis.flatten(1).unflatten(0, (self.groups, -1)).mT for axis in axes]
        return [expand.flatten(2), reduce.flatten(2).mT, *thin]

    def kernel(self) -> Tensor:
        """Multiplies out the dense kernel ``[groups, out / groups, in / groups, *k]``."""
        letters = _LETTERS[-len(self.kernel_size) :]
        sides = ",".join(f"g{letter}r" for letter in letters)
        return torch.einsum(f"gor,gir,{sides}->goi{letters}", *self._matrices())

    def factors(self) -> CP | Blocks:
        """The weight as a CP decomposition with unit columns; with groups, one below the other."""
        parts = []
        for group in zip(*(matrix.detach() for matrix in self._matrices()), strict=True):
            norms = [torch.linalg.vector_norm(matrix, dim=0) for matrix in group]
            units = [matrix / norm.clamp_min(1e-30) for matrix, norm in zip(group, norms, strict=True)]
            weights = torch.stack(norms).prod(0)
            order = weights.argsort(descending=True)
            units = [unit[:, order] for unit in units]
            if self.transposed:
                units[:2] = units[1::-1]
            parts.append(CP(weights[order], tuple(units)))
        return parts[0] if len(parts) == 1 else Blocks(tuple(parts))


class CPConv1d(CPConv):
    """A 1-d convolution as a sum of ``rank`` separable kernels: pointwise, depthwise, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv1d``.
        rank: number of components per group: an integer (clamped) or ``ParameterFraction``.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.Conv1d``.

    Attributes:
        reduce: ``nn.Conv1d(in_channels, groups*rank, 1, bias=False)``.
        horizontal: ``nn.Conv1d(groups*rank, groups*rank, kernel_size, groups=groups*rank, bias=False)``.
        expand: ``nn.Conv1d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.CPConv1d(16, 32, 5, padding=2, rank=8)(torch.randn(1, 16, 20)).shape
        torch.Size([1, 32, 20])
    """

    dense_type = nn.Conv1d


class CPConv2d(CPConv):
    """A 2-d convolution as a sum of ``rank`` separable kernels (Lebedev et al., 2015).

    It runs as 1 x 1, depthwise k x 1, depthwise 1 x k, 1 x 1.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the convolution kernel.
        stride: stride of the convolution.
        padding: padding of the input: numbers, ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: number of groups; each is factorized on its own, at the same rank.
        bias: whether the layer has a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: number of components per group: an integer (clamped to the largest rank of use) or ``ParameterFraction``;
            other rules would need singular values, which a CP decomposition does not have.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, groups*rank, 1, bias=False)``.
        vertical: ``nn.Conv2d(groups*rank, groups*rank, (kh, 1), groups=groups*rank, bias=False)``.
        horizontal: ``nn.Conv2d(groups*rank, groups*rank, (1, kw), groups=groups*rank, bias=False)``.
        expand: ``nn.Conv2d(groups*rank, out_channels, 1, bias=bias)``.

    Raises:
        LowRankError: if the rank is neither an integer of at least 1 nor a rule.

    Examples:
        >>> layer = lr.CPConv2d(64, 64, 3, padding=1, rank=96)
        >>> layer(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
        >>> conv = nn.Conv2d(4, 3, 3, padding=1)
        >>> full = lr.CPConv2d.from_dense(conv, rank=27)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(full(x), conv(x), atol=1e-4)
        True
    """

    dense_type = nn.Conv2d


class CPConv3d(CPConv):
    """A 3-d convolution as a sum of ``rank`` separable kernels: pointwise, depthwise along each axis, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv3d``.
        rank: number of components per group: an integer (clamped) or ``ParameterFraction``.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.Conv3d``.

    Attributes:
        reduce: ``nn.Conv3d(in_channels, groups*rank, 1, bias=False)``.
        depth: ``nn.Conv3d(groups*rank, groups*rank, (kd, 1, 1), groups=groups*rank, bias=False)``.
        vertical: ``nn.Conv3d(groups*rank, groups*rank, (1, kh, 1), groups=groups*rank, bias=False)``.
        horizontal: ``nn.Conv3d(groups*rank, groups*rank, (1, 1, kw), groups=groups*rank, bias=False)``.
        expand: ``nn.Conv3d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.CPConv3d(8, 16, 3, rank=4)(torch.randn(1, 8, 5, 5, 5)).shape
        torch.Size([1, 16, 3, 3, 3])
    """

    dense_type = nn.Conv3d


class CPConvTranspose1d(TransposedConv, CPConv):
    """A transposed 1-d convolution as a sum of ``rank`` separable kernels.

    It runs as pointwise, transposed depthwise along each axis, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose1d``.
        rank: number of components per group: an integer (clamped) or ``ParameterFraction``.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.ConvTranspose1d``.

    Attributes:
        reduce: ``nn.Conv1d(in_channels, groups*rank, 1, bias=False)``.
        horizontal: ``nn.ConvTranspose1d(groups*rank, groups*rank, kernel_size, groups=groups*rank, bias=False)``.
        expand: ``nn.Conv1d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.CPConvTranspose1d(8, 16, 4, stride=2, rank=4)(torch.randn(1, 8, 10)).shape
        torch.Size([1, 16, 22])
    """

    dense_type = nn.ConvTranspose1d


class CPConvTranspose2d(TransposedConv, CPConv):
    """A transposed 2-d convolution as a sum of ``rank`` separable kernels.

    It runs as pointwise, transposed depthwise along each axis, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose2d``.
        rank: number of components per group: an integer (clamped) or ``ParameterFraction``.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.ConvTranspose2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, groups*rank, 1, bias=False)``.
        vertical: ``nn.ConvTranspose2d(groups*rank, groups*rank, (kh, 1), groups=groups*rank, bias=False)``.
        horizontal: ``nn.ConvTranspose2d(groups*rank, groups*rank, (1, kw), groups=groups*rank, bias=False)``.
        expand: ``nn.Conv2d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.CPConvTranspose2d(8, 16, 4, stride=2, padding=1, rank=4)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 10, 10])
    """

    dense_type = nn.ConvTranspose2d


class CPConvTranspose3d(TransposedConv, CPConv):
    """A transposed 3-d convolution as a sum of ``rank`` separable kernels.

    It runs as pointwise, transposed depthwise along each axis, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose3d``.
        rank: number of components per group: an integer (clamped) or ``ParameterFraction``.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.ConvTranspose3d``.

    Attributes:
        reduce: ``nn.Conv3d(in_channels, groups*rank, 1, bias=False)``.
        depth: ``nn.ConvTranspose3d(groups*rank, groups*rank, (kd, 1, 1), groups=groups*rank, bias=False)``.
        vertical: ``nn.ConvTranspose3d(groups*rank, groups*rank, (1, kh, 1), groups=groups*rank, bias=False)``.
        horizontal: ``nn.ConvTranspose3d(groups*rank, groups*rank, (1, 1, kw), groups=groups*rank, bias=False)``.
        expand: ``nn.Conv3d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.CPConvTranspose3d(8, 16, 2, stride=2, rank=4)(torch.randn(1, 8, 3, 4, 4)).shape
        torch.Size([1, 16, 6, 8, 8])
    """

    dense_type = nn.ConvTranspose3d
