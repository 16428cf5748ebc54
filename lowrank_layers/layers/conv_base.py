"""What the factored convolutions share: torch.nn's settings, and the way to and from the dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .base import FactoredModule, adopt, adopt_dense, bias_of, reset_chain
from .kernel import CONVS, ConvNd, weight_of_kernel

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Conv = TypeVar("Conv", bound="FactoredConv")


class FactoredConv(FactoredModule):
    """A chain of thin convolutions in the place of one, of any dimension; groups are factorized one by one.

    A subclass builds its children in ``_build`` and says which kernel they make in ``kernel``.
    """

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
        self._take(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta", dtype
        )
        self._build(rank, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _take(self, *settings: Any) -> None:
        """Lets torch check the settings; nothing is allocated on the meta device."""
        try:
            dense = self.dense_type(*settings)
        except (ValueError, RuntimeError) as error:
            raise LowRankError(f"{type(self).__name__}: {error}") from None
        assert isinstance(dense, ConvNd)
        self.in_channels: int = dense.in_channels
        self.out_channels: int = dense.out_channels
        self.kernel_size: tuple[int, ...] = dense.kernel_size
        self.stride: tuple[int, ...] = dense.stride
        self.padding: str | tuple[int, ...] = dense.padding
        self.output_padding: tuple[int, ...] = dense.output_padding
        self.dilation: tuple[int, ...] = dense.dilation
        self.groups: int = dense.groups
        self.padding_mode = dense.padding_mode
        self.transposed: bool = dense.transposed

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        raise NotImplementedError

    def kernel(self) -> Tensor:
        """The dense kernel that the children make, ``[groups, out / groups, in / groups, *k]``."""
        raise NotImplementedError

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of one group's kernel, ``[out / groups, in / groups, *k]``."""
        return self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size

    def product(self) -> Tensor:
        """The dense weight, multiplied out, differentiable."""
        return weight_of_kernel(self.kernel(), transposed=self.transposed)

    def reset_parameters(self) -> None:
        """Draws new weights with the output variance of a fresh dense layer."""
        out, into, *k = self.kernel_shape
        reset_chain(self, torch.Size([out if self.transposed else into, *k]).numel())

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer."""
        for child in self.parts:
            input = child(input)
        return input

    @classmethod
    def like(cls: type[Conv], dense: nn.Module, *, rank: Any, bias: bool | None = None, **form: Any) -> Conv:
        """A layer with the settings, device and dtype of ``dense``, uninitialized."""
        assert isinstance(dense, ConvNd)
        with_bias = dense.bias is not None if bias is None else bias
        device, dtype = dense.weight.device, dense.weight.dtype
        layer = cls(**_settings(dense), bias=with_bias, device="meta", dtype=dtype, rank=rank, **form)
        return adopt(layer.to_empty(device=device), dense)

    def to_dense(self) -> nn.Module:
        """The torch layer that computes the same."""
        bias = bias_of(self.last)
        weight = self.weight.detach()
        dense: nn.Module = nn.utils.skip_init(
            self.dense_type, **_settings(self), bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            dense.get_parameter("weight").copy_(weight)
            if bias is not None:
                dense.get_parameter("bias").copy_(bias)
        adopt_dense(dense, self)
        return dense

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if isinstance(self.padding, str) or any(self.padding):
            text += f", padding={self.padding}"
        if any(d != 1 for d in self.dilation):
            text += f", dilation={self.dilation}"
        if any(self.output_padding):
            text += f", output_padding={self.output_padding}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if bias_of(self.last) is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return "".join([text, f", rank={self.rank}", *(f", {key}={value!r}" for key, value in self.form.items())])

    def _pointwise(self, into: int, out: int, factory: dict[str, Any], *, bias: bool = False) -> nn.Module:
        """A 1 x 1 convolution within the groups."""
        conv = CONVS[len(self.kernel_size)]
        return conv(into, out, 1, groups=self.groups, bias=bias, **factory)

    def _spatial(
        self,
        into: int,
        out: int,
        factory: dict[str, Any],
        *,
        axes: Sequence[int] | None = None,
        groups: int | None = None,
        bias: bool = False,
    ) -> nn.Module:
        """The convolution itself between other channels, or what it does along some axes only (none: pointwise)."""
        dims = len(self.kernel_size)
        taken = range(dims) if axes is None else axes
        if not taken:
            return self._pointwise(into, out, factory, bias=bias)

        def only(value: Any, neutral: int) -> Any:
            if isinstance(value, str):
                return value
            return tuple(value[axis] if axis in taken else neutral for axis in range(dims))

        settings = {
            "kernel_size": only(self.kernel_size, 1),
            "stride": only(self.stride, 1),
            "padding": only(self.padding, 0),
            "dilation": only(self.dilation, 1),
            "padding_mode": self.padding_mode,
        }
        if self.transposed:
            settings["output_padding"] = only(self.output_padding, 0)
        return self.dense_type(into, out, groups=groups or self.groups, bias=bias, **settings, **factory)


class TransposedConv(FactoredConv):
    """The same for transposed convolutions, whose constructor and forward have another signature."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._take(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            "meta",
            dtype,
        )
        self._build(rank, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``[N, in_channels, ...]`` to ``[N, out_channels, ...]``; ``output_size`` settles the strides' ambiguity."""
        dims = len(self.kernel_size)
        spatial = [child for child in self.parts if getattr(child, "transposed", False)]
        for child in self.parts:
            if output_size is None or child not in spatial:
                input = child(input)
                continue
            # the only one runs along all axes, else the k-th one along the k-th
            axes = range(dims) if len(spatial) == 1 else [spatial.index(child)]
            size = [output_size[axis - dims] if axis in axes else input.shape[axis - dims] for axis in range(dims)]
            input = child(input, size)
        return input


def _settings(conv: Any) -> dict[str, Any]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if conv.transposed:
        names.append("output_padding")
    return {name: getattr(conv, name) for name in names}
