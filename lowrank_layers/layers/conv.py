"""nn.Conv2d as a convolution to fewer channels and a 1 x 1 convolution (channel SVD)."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..factors import SVD
from ..rank import Rank, choose_rank
from .base import FactoredModule, adopt, adopt_dense, bias_of, check_dense, fill, reset_chain
from .linear import pair_factors, pair_spectrum, truncated_pair

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Conv = TypeVar("Conv", bound="FactoredConv2d")


class FactoredConv2d(FactoredModule):
    """What the factored convolutions share: torch.nn's settings and the way to and from ``nn.Conv2d``.

    A subclass builds its children in ``_build`` and says what weight they make in ``weight``.
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
        rank: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if groups != 1:
            raise UnsupportedLayerError(
                f"{name}: got groups={groups}, expected 1; a grouped convolution is left dense"
                " (it is already block-diagonal)."
            )
        # torch checks the settings; nothing is allocated on the meta device
        dense = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            1,
            bias,
            padding_mode,
            "meta",
            dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = dense.kernel_size  # type: ignore[assignment]
        self.stride: tuple[int, int] = dense.stride  # type: ignore[assignment]
        self.padding: str | tuple[int, int] = dense.padding  # type: ignore[assignment]
        self.dilation: tuple[int, int] = dense.dilation  # type: ignore[assignment]
        self.groups = 1
        self.padding_mode: PaddingMode = padding_mode
        self._build(rank, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        raise UnsupportedLayerError(f"{type(self).__name__} does not define its children.")

    def weight_from_children(self) -> Tensor:
        """The dense kernel ``[out, in, kh, kw]`` that the children make."""
        raise UnsupportedLayerError(f"{type(self).__name__} does not define its weight.")

    def reset_parameters(self) -> None:
        """Draws new weights with the output variance of a fresh ``nn.Conv2d``."""
        reset_chain(self, self.in_channels * math.prod(self.kernel_size))

    @classmethod
    def like(cls: type[Conv], dense: nn.Module, *, rank: Any, bias: bool | None = None) -> Conv:
        """A layer with the settings, device and dtype of ``dense``, uninitialized."""
        assert isinstance(dense, nn.Conv2d)
        check_groups(cls, dense)
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,  # type: ignore[arg-type]
            dense.stride,  # type: ignore[arg-type]
            dense.padding,  # type: ignore[arg-type]
            dense.dilation,  # type: ignore[arg-type]
            1,
            dense.bias is not None if bias is None else bias,
            dense.padding_mode,
            "meta",
            dense.weight.dtype,
            rank=rank,
        )
        layer.to_empty(device=dense.weight.device)
        return adopt(layer, dense)

    def to_dense(self) -> nn.Conv2d:
        """The ``nn.Conv2d`` that computes the same."""
        bias = bias_of(self.last)
        weight = self.weight_from_children().detach()
        dense: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            1,
            bias is not None,
            self.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            if bias is not None:
                dense.get_parameter("bias").copy_(bias)
        adopt_dense(dense, self)
        return dense

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ((0, 0), 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if bias_of(self.last) is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, rank={self.rank}"

    def _spatial(self, axis: int) -> dict[str, Any]:
        """The settings of a convolution that runs along one axis only."""

        def only(value: tuple[int, int], neutral: int) -> tuple[int, int]:
            return (value[0], neutral) if axis == 0 else (neutral, value[1])

        return {
            "kernel_size": only(self.kernel_size, 1),
            "stride": only(self.stride, 1),
            "padding": self.padding if isinstance(self.padding, str) else only(self.padding, 0),
            "dilation": only(self.dilation, 1),
            "padding_mode": self.padding_mode,
        }


class LowRankConv2d(FactoredConv2d):
    """A 2-d convolution to ``rank`` channels, then a 1 x 1 convolution: the kernel ``[out, in*kh*kw]`` as a pair.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel.
        stride: stride of the convolution.
        padding: numbers, ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: must be 1.
        bias: whether a bias is added.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner channels: an integer (clamped to ``min(out_channels, in_channels*kh*kw)``) or a rule that needs
            no weights.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        down: ``nn.Conv2d(in_channels, rank, kernel_size, ..., bias=False)``.
        up: ``nn.Conv2d(rank, out_channels, 1, bias=bias)``.

    Raises:
        UnsupportedLayerError: for ``groups`` other than 1.
        LowRankError: if the rank is no integer of at least 1 and no rule.

    Examples:
        >>> layer = lr.LowRankConv2d(64, 128, 3, stride=2, padding=1, rank=16)
        >>> layer(torch.randn(1, 64, 32, 32)).shape
        torch.Size([1, 128, 16, 16])

    Channel decomposition of Zhang et al., "Accelerating Very Deep Convolutional Networks", 2015.
    """

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        columns = self.in_channels * math.prod(self.kernel_size)
        spectrum = pair_spectrum(self.out_channels, columns, None, type(self).__name__)
        rank = choose_rank(rank, spectrum, min(self.out_channels, columns))
        self.down = nn.Conv2d(
            self.in_channels,
            rank,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=False,
            padding_mode=self.padding_mode,
            **factory,
        )
        self.up = nn.Conv2d(rank, self.out_channels, 1, bias=bias, **factory)

    @property
    def rank(self) -> int:
        """Number of inner channels."""
        return self.down.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        out: Tensor = self.up(self.down(input))
        return out

    @classmethod
    def from_dense(cls, conv: nn.Module, *, rank: Rank) -> LowRankConv2d:
        """The best pair of that rank for a trained convolution: the SVD of its kernel as ``[out, in*kh*kw]``.

        Args:
            conv: an ``nn.Conv2d``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Conv2d`` with one group.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> conv = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
            >>> full = lr.LowRankConv2d.from_dense(conv, rank=8)
            >>> x = torch.randn(2, 3, 9, 9)
            >>> torch.allclose(full(x), conv(x), atol=1e-5)
            True
        """
        weight = check_dense(cls, conv)
        check_groups(cls, conv)
        up, down = truncated_pair(weight.flatten(1), rank, cls.__name__)
        return fill(cls.like(conv, rank=len(down)), [down, up], bias_of(conv))

    def weight_from_children(self) -> Tensor:
        """The dense kernel ``[out, in, kh, kw]``."""
        down = self.down.weight
        return (self.up.weight.flatten(1) @ down.flatten(1)).reshape(self.out_channels, *down.shape[1:])

    def factors(self) -> SVD:
        """The kernel ``[out, in*kh*kw]`` as an SVD."""
        return pair_factors(self.up.weight.flatten(1), self.down.weight.flatten(1))


def check_groups(cls: type[FactoredModule], conv: nn.Module) -> None:
    """Refuses grouped convolutions by name."""
    if getattr(conv, "groups", 1) != 1:
        raise UnsupportedLayerError(
            f"{cls.__name__}.from_dense: got groups={conv.groups}, expected 1; leave grouped convolutions dense."
        )
