"""Convolutions as pairs: one to few channels and a 1 x 1, or a k x 1 and a 1 x k."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ..errors import LowRankError
from ..rank import Rank
from .conv_base import PaddingMode, Size, TransposedConv
from .pair_conv import PairConv

Mode = Literal["channel", "spatial"]


class LowRankConv1d(PairConv):
    """A 1-d convolution of low rank: one to ``rank`` channels, then a pointwise one.

    Its kernel as a matrix ``[out, in*k]`` has rank at most ``rank``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv1d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.Conv1d``.

    Attributes:
        down: ``nn.Conv1d(in_channels, groups*rank, kernel_size, ..., bias=False)``.
        up: ``nn.Conv1d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> conv = nn.Conv1d(16, 32, 5, stride=2, padding=2, groups=4)
        >>> full = lr.LowRankConv1d.from_dense(conv, rank=8)
        >>> x = torch.randn(2, 16, 20)
        >>> torch.allclose(full(x), conv(x), atol=1e-5)
        True
    """

    dense_type = nn.Conv1d


class LowRankConv2d(PairConv):
    """A 2-d convolution of low rank: one to ``rank`` channels, then a 1 x 1; or a k x 1, then a 1 x k.

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
        rank: inner channels per group: an integer (clamped to the sides of the matrix) or a rule that needs no weights.
        mode: ``"channel"`` (Zhang et al., 2015) factorizes the kernel as a matrix ``[out, in*kh*kw]``, ``"spatial"``
            (Jaderberg et al., 2014) as ``[out*kw, in*kh]``.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        down: ``nn.Conv2d(in_channels, groups*rank, kernel_size, ..., bias=False)``; spatially its kernel is k x 1.
        up: ``nn.Conv2d(groups*rank, out_channels, 1, bias=bias)``; spatially its kernel is 1 x k.

    Raises:
        LowRankError: if the rank is neither an integer of at least 1 nor a rule, or the mode is unknown.

    Examples:
        >>> layer = lr.LowRankConv2d(64, 128, 3, stride=2, padding=1, rank=16)
        >>> layer(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 128, 16, 16])
        >>> conv = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        >>> full = lr.LowRankConv2d.from_dense(conv, rank=9, mode="spatial")
        >>> x = torch.randn(2, 3, 9, 9)
        >>> torch.allclose(full(x), conv(x), atol=1e-5)
        True
    """

    dense_type = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
        mode: Mode = "channel",
    ) -> None:
        if mode not in ("channel", "spatial"):
            raise LowRankError(f"LowRankConv2d: got mode {mode!r}, expected 'channel' or 'spatial'.")
        self.mode = mode  # before the base builds the children
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            rank=rank,
        )

    def _first_axes(self) -> tuple[int, ...]:
        return (0,) if self.mode == "spatial" else super()._first_axes()

    @property
    def form(self) -> dict[str, Any]:
        """The mode, unless it is the default."""
        return {} if self.mode == "channel" else {"mode": self.mode}


class LowRankConv3d(PairConv):
    """A 3-d convolution of low rank: one to ``rank`` channels, then a pointwise one.

    Its kernel as a matrix ``[out, in*kd*kh*kw]`` has rank at most ``rank``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv3d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.Conv3d``.

    Attributes:
        down: ``nn.Conv3d(in_channels, groups*rank, kernel_size, ..., bias=False)``.
        up: ``nn.Conv3d(groups*rank, out_channels, 1, bias=bias)``.

    Examples:
        >>> lr.LowRankConv3d(8, 16, 3, padding=1, rank=4)(torch.randn(1, 8, 4, 6, 6)).shape
        torch.Size([1, 16, 4, 6, 6])
    """

    dense_type = nn.Conv3d


class LowRankConvTranspose1d(TransposedConv, PairConv):
    """A transposed 1-d convolution of low rank: a pointwise one to ``rank`` channels, then a transposed one.

    Its kernel as a matrix ``[in, out*k]`` has rank at most ``rank``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose1d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.ConvTranspose1d``.

    Attributes:
        down: ``nn.Conv1d(in_channels, groups*rank, 1, bias=False)``.
        up: ``nn.ConvTranspose1d(groups*rank, out_channels, kernel_size, ..., bias=bias)``.

    Examples:
        >>> lr.LowRankConvTranspose1d(8, 16, 4, stride=2, rank=4)(torch.randn(1, 8, 10)).shape
        torch.Size([1, 16, 22])
    """

    dense_type = nn.ConvTranspose1d


class LowRankConvTranspose2d(TransposedConv, PairConv):
    """A transposed 2-d convolution of low rank: a 1 x 1 one to ``rank`` channels, then a transposed one.

    It is the adjoint of :class:`LowRankConv2d`, whose children run in the other order. Its kernel as a matrix
    ``[in, out*kh*kw]`` has rank at most ``rank``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose2d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.ConvTranspose2d``.

    Attributes:
        down: ``nn.Conv2d(in_channels, groups*rank, 1, bias=False)``.
        up: ``nn.ConvTranspose2d(groups*rank, out_channels, kernel_size, ..., bias=bias)``.

    Examples:
        >>> conv = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        >>> full = lr.LowRankConvTranspose2d.from_dense(conv, rank=16)
        >>> x = torch.randn(2, 16, 5, 5)
        >>> torch.allclose(full(x), conv(x), atol=1e-5)
        True
    """

    dense_type = nn.ConvTranspose2d


class LowRankConvTranspose3d(TransposedConv, PairConv):
    """A transposed 3-d convolution of low rank: a pointwise one to ``rank`` channels, then a transposed one.

    Its kernel as a matrix ``[in, out*kd*kh*kw]`` has rank at most ``rank``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, \
device, dtype: as in ``nn.ConvTranspose3d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.ConvTranspose3d``.

    Attributes:
        down: ``nn.Conv3d(in_channels, groups*rank, 1, bias=False)``.
        up: ``nn.ConvTranspose3d(groups*rank, out_channels, kernel_size, ..., bias=bias)``.

    Examples:
        >>> lr.LowRankConvTranspose3d(8, 16, 2, stride=2, rank=4)(torch.randn(1, 8, 3, 4, 4)).shape
        torch.Size([1, 16, 6, 8, 8])
    """

    dense_type = nn.ConvTranspose3d
