"""Base classes of factored convolutions: torch.nn's settings, and conversion from and to the dense layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .base import FactoredModule
from .conversion import adopt, adopt_dense
from .initialization import reset_chain
from .kernel import CONVS, ConvNd, weight_of_kernel
from .weights import bias_of

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Conv = TypeVar("Conv", bound="FactoredConv")


class FactoredConv(FactoredModule):
    """A chain of thin convolutions in place of one, in 1 to 3 dimensions; each group is factorized on its own.

    A subclass builds its children in ``_build`` and multiplies them out in ``kernel``.
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
        """Checks the settings by building the dense layer on the meta device, and copies them from it."""
        try:
            dense = self.dense_type(*settings)
        except (ValueError, RuntimeError) as error:
            raise LowRankError(f"{type(self).__name__}: {error}.") from None
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
        """Creates the children.

        Args:
            rank: rank argument of the constructor.
            bias: whether the last child has a bias.
            factory: device and dtype of the parameters.
        """
        raise NotImplementedError

    def kernel(self) -> Tensor:
        """Multiplies out the dense kernel ``[groups, out / groups, in / groups, *k]``."""
        raise NotImplementedError

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel of one group, ``[out / groups, in / groups, *k]``."""
        return self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size

    def product(self) -> Tensor:
        """Multiplies out the dense weight, differentiably."""
        return weight_of_kernel(self.kernel(), transposed=self.transposed)

    def reset_parameters(self) -> None:
        """Draws new weights such that outputs have the variance that those of a new dense layer have."""
        out, into, *k = self.kernel_shape
        reset_chain(self, torch.Size([out if self.transposed else into, *k]).numel())

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer does."""
        for child in self.parts:
            input = child(input)
        return input

    @classmethod
    def like(cls: type[Conv], dense: nn.Module, *, rank: Any, bias: bool | None = None, **form: Any) -> Conv:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``."""
        assert isinstance(dense, ConvNd)
        with_bias = dense.bias is not None if bias is None else bias
        device, dtype = dense.weight.device, dense.weight.dtype
        layer = cls(**_settings(dense), bias=with_bias, device="meta", dtype=dtype, rank=rank, **form)
        return adopt(layer.to_empty(device=device), dense)

    def to_dense(self) -> nn.Module:
        """Multiplies the factors out into the torch layer that computes the same."""
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
        """The settings, for ``repr``."""
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

    def _pointwise(self, into: int, out: int, **more: Any) -> nn.Module:
        """Creates a convolution with kernel size 1, by default in the same groups and without a bias."""
        return CONVS[len(self.kernel_size)](into, out, 1, **{"groups": self.groups, "bias": False, **more})

    def _spatial(self, into: int, out: int, *, axes: Sequence[int] | None = None, **more: Any) -> nn.Module:
        """Creates a convolution with the settings of this one, by default in the same groups and without a bias.

        Args:
            into: number of input channels.
            out: number of output channels.
            axes: the axes along which it runs; by default all. Without any axis it is pointwise.
            **more: other arguments of torch's constructor.
        """
        dims = len(self.kernel_size)
        taken = range(dims) if axes is None else axes
        if not taken:
            return self._pointwise(into, out, **more)

        def only(value: Any, neutral: int) -> Any:
            """Keeps a setting along the axes taken; named paddings stay."""
            if isinstance(value, str):
                return value
            return tuple(value[axis] if axis in taken else neutral for axis in range(dims))

        settings = {
            "groups": self.groups,
            "bias": False,
            "kernel_size": only(self.kernel_size, 1),
            "stride": only(self.stride, 1),
            "padding": only(self.padding, 0),
            "dilation": only(self.dilation, 1),
            "padding_mode": self.padding_mode,
        }
        if self.transposed:
            settings["output_padding"] = only(self.output_padding, 0)
        return self.dense_type(into, out, **{**settings, **more})


class TransposedConv(FactoredConv):
    """Base class of factored transposed convolutions, whose constructor and forward have another signature."""

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
        """Maps ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer does.

        Args:
            input: the input.
            output_size: which of the output sizes that a stride allows.
        """
        dims = len(self.kernel_size)
        spatial = [child for child in self.parts if getattr(child, "transposed", False)]
        for child in self.parts:
            if output_size is None or child not in spatial:
                input = child(input)
                continue
            # a single transposed child runs along all axes; of several, the k-th runs along the k-th axis
            axes = range(dims) if len(spatial) == 1 else [spatial.index(child)]
            size = [output_size[axis - dims] if axis in axes else input.shape[axis - dims] for axis in range(dims)]
            input = child(input, size)
        return input


def _settings(conv: Any) -> dict[str, Any]:
    """Arguments of torch's constructor, read from a dense or factored convolution."""
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if conv.transposed:
        names.append("output_padding")
    return {name: getattr(conv, name) for name in names}
