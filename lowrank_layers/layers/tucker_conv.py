"""Convolutions in Tucker-2 form: fewer channels in, a small core convolution, more channels out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..decompose import tucker
from ..decompose.tucker_ranks import choose_tucker_rank
from ..errors import LowRankError
from ..factors import Blocks, Tucker
from ..rank import RankRule
from .conv_base import FactoredConv, TransposedConv
from .conversion import fill
from .instance_checks import check_dense
from .kernel import kernel_of, weight_of_kernel
from .weights import bias_of, weight_of

TuckerRank = int | RankRule | Sequence[int | RankRule]
Conv = TypeVar("Conv", bound="TuckerConv")


class TuckerConv(FactoredConv):
    """A convolution in Tucker-2 form: pointwise to fewer channels, a small core convolution, pointwise back."""

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        out, into = choose_tucker_rank(rank, self.kernel_shape, None, type(self).__name__)
        out, into = out * self.groups, into * self.groups
        self.reduce = self._pointwise(self.in_channels, into, **factory)
        self.core = self._spatial(into, out, **factory)
        self.expand = self._pointwise(out, self.out_channels, bias=bias, **factory)

    @property
    def rank(self) -> tuple[int, int]:
        """``(rank_out, rank_in)`` per group."""
        return kernel_of(self.expand).shape[2], kernel_of(self.reduce).shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer does."""
        out: Tensor = self.expand(self.core(self.reduce(input)))
        return out

    @classmethod
    def from_dense(cls: type[Conv], conv: nn.Module, *, rank: TuckerRank) -> Conv:
        """Factorizes a trained convolution by HOOI on the channel modes; the spatial modes stay whole.

        Args:
            conv: the dense convolution.
            rank: ``(rank_out, rank_in)``, one integer for both, or a rule. A rule on singular values gets those of the
                unfolding of each mode (the root mean square over the groups); ``ParameterFraction`` shrinks both ranks
                in proportion.

        Raises:
            UnsupportedLayerError: if it is not the plain torch layer that this class replaces.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        check_dense(cls, conv)
        kernels = kernel_of(conv).detach()
        ranks = choose_tucker_rank(rank, tuple(kernels.shape[1:]), kernels, cls.__name__)
        whole = (None,) * (kernels.ndim - 3)
        return cls.from_parts(conv, [tucker(kernel, (*ranks, *whole)) for kernel in kernels])

    @classmethod
    def from_parts(cls: type[Conv], conv: nn.Module, parts: Sequence[Tucker]) -> Conv:
        """Builds a layer like ``conv`` from the Tucker decomposition of each group's ``[out, in, *k]``."""
        expand, reduce = (torch.stack([_factor(part, mode) for part in parts]) for mode in (0, 1))
        core = torch.stack([part.core for part in parts])
        return cls.from_chain(conv, reduce.mT, core, expand, bias_of(conv))

    @classmethod
    def from_chain(
        cls: type[Conv], conv: nn.Module, reduce: Tensor, core: Tensor, expand: Tensor, bias: Tensor | None
    ) -> Conv:
        """Builds a layer like ``conv`` from the weights of its children.

        Shape:
            ``[groups, rank_in, in]``, ``[groups, rank_out, rank_in, *k]``, ``[groups, out, rank_out]``.
        """
        layer = cls.like(conv, rank=tuple(core.shape[1:3]), bias=bias is not None)
        return fill(layer, [reduce, weight_of_kernel(core, transposed=layer.transposed), expand], bias)

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """The factors ``[groups, rank_in, in]``, core kernel and ``[groups, out, rank_out]``."""
        return kernel_of(self.reduce).flatten(2), kernel_of(self.core), kernel_of(self.expand).flatten(2)

    def kernel(self) -> Tensor:
        """Multiplies out the dense kernel ``[groups, out / groups, in / groups, *k]``."""
        reduce, core, expand = self._matrices()
        return torch.einsum("gos,gsr...,gri->goi...", expand, core, reduce)

    def factors(self) -> Tucker | Blocks:
        """The weight as a Tucker decomposition with orthonormal factors; with groups, one below the other."""
        parts = []
        for reduce, core, expand in zip(*(matrix.detach().double() for matrix in self._matrices()), strict=True):
            left, right = torch.linalg.qr(expand), torch.linalg.qr(reduce.mT)
            small = torch.einsum("as,sr...,br->ab...", left.R, core, right.R).to(weight_of(self.core).dtype)
            sides = [side.to(small.dtype) for side in (left.Q, right.Q)]
            if self.transposed:
                small, sides = small.transpose(0, 1), sides[::-1]
            parts.append(Tucker(small, (*sides, *[None] * (core.ndim - 2))))
        return parts[0] if len(parts) == 1 else Blocks(tuple(parts))


def _factor(part: Tucker, mode: int) -> Tensor:
    """Returns the factor of one mode, or raises if that mode was left whole."""
    factor = part.factors[mode]
    if factor is None:
        raise LowRankError(f"TuckerConv: mode {mode} of the factorization was left whole, expected a factor.")
    return factor


class TuckerConv1d(TuckerConv):
    """A 1-d convolution in Tucker-2 form: pointwise to fewer channels, a small core convolution, pointwise back.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv1d``.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.Conv1d``.

    Attributes:
        reduce: ``nn.Conv1d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.Conv1d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv1d(groups*rank_out, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.TuckerConv1d(16, 32, 5, padding=2, rank=(8, 4))(torch.randn(1, 16, 20)).shape
        torch.Size([1, 32, 20])
    """

    dense_type = nn.Conv1d


class TuckerConv2d(TuckerConv):
    """A 2-d convolution in Tucker-2 form (Kim et al., 2016).

    It runs as a 1 x 1 convolution to fewer channels, a small core convolution, and a 1 x 1 back.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the convolution kernel.
        stride: stride of the convolution.
        padding: padding of the input: numbers, ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: number of groups; each is factorized on its own, at the same ranks.
        bias: whether the layer has a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.Conv2d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv2d(groups*rank_out, out_channels, 1, bias=bias)``.

    Raises:
        LowRankError: if a rank is neither an integer of at least 1 nor a rule.

    Examples:
        >>> layer = lr.TuckerConv2d(256, 256, 3, stride=2, padding=1, rank=(64, 64))
        >>> layer(torch.randn(1, 256, 14, 14)).shape
        torch.Size([1, 256, 7, 7])
        >>> conv = nn.Conv2d(16, 8, 3, stride=(2, 1))
        >>> full = lr.TuckerConv2d.from_dense(conv, rank=(8, 16))
        >>> x = torch.randn(2, 16, 9, 9)
        >>> torch.allclose(full(x), conv(x), atol=1e-5)
        True
    """

    dense_type = nn.Conv2d


class TuckerConv3d(TuckerConv):
    """A 3-d convolution in Tucker-2 form: pointwise to fewer channels, a small core convolution, pointwise back.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv3d``.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.Conv3d``.

    Attributes:
        reduce: ``nn.Conv3d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.Conv3d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv3d(groups*rank_out, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.TuckerConv3d(8, 16, 3, rank=4)(torch.randn(1, 8, 5, 5, 5)).shape
        torch.Size([1, 16, 3, 3, 3])
    """

    dense_type = nn.Conv3d


class TuckerConvTranspose1d(TransposedConv, TuckerConv):
    """A transposed 1-d convolution in Tucker-2 form: pointwise, a small transposed core, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose1d``.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.ConvTranspose1d``.

    Attributes:
        reduce: ``nn.Conv1d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.ConvTranspose1d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv1d(groups*rank_out, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.TuckerConvTranspose1d(8, 16, 4, stride=2, rank=4)(torch.randn(1, 8, 10)).shape
        torch.Size([1, 16, 22])
    """

    dense_type = nn.ConvTranspose1d


class TuckerConvTranspose2d(TransposedConv, TuckerConv):
    """A transposed 2-d convolution in Tucker-2 form: pointwise, a small transposed core, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose2d``.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.ConvTranspose2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.ConvTranspose2d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv2d(groups*rank_out, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.TuckerConvTranspose2d(8, 16, 4, stride=2, padding=1, rank=4)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 16, 10, 10])
    """

    dense_type = nn.ConvTranspose2d


class TuckerConvTranspose3d(TransposedConv, TuckerConv):
    """A transposed 3-d convolution in Tucker-2 form: pointwise, a small transposed core, pointwise.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose3d``.
        rank: ``(rank_out, rank_in)`` per group, one integer for both, or a rule; integers are clamped.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.ConvTranspose3d``.

    Attributes:
        reduce: ``nn.Conv3d(in_channels, groups*rank_in, 1, bias=False)``.
        core: ``nn.ConvTranspose3d(groups*rank_in, groups*rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv3d(groups*rank_out, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.TuckerConvTranspose3d(8, 16, 2, stride=2, rank=4)(torch.randn(1, 8, 3, 4, 4)).shape
        torch.Size([1, 16, 6, 8, 8])
    """

    dense_type = nn.ConvTranspose3d
