"""Linear layers in int8."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad

from .int8_layer import Int8Layer

KERNEL_ROWS = 64
"""Rows of inputs up to which torch's int8 kernel multiplies; with more, a product in floating point is faster."""
KERNEL_BLOCK = 32
"""The kernel reads so many inputs at a time, and past the end of a row that is no multiple of it."""
KERNEL_ALIGNMENT = 32
"""In bytes; elsewhere the kernel ends the process. Tensors that are mapped from a file may lie anywhere."""


class Int8Linear(Int8Layer, nn.Linear):  # type: ignore[override]
    r"""A linear layer with a weight in int8: :math:`y = x (\mathrm{diag}(s) \, C)^\top + b`.

    It takes a quarter of the bytes of a layer in fp32. On a CPU, in bfloat16 or float16 and for few rows of inputs, it
    multiplies with torch's int8 kernel, the one that torchao's layers compile to; otherwise the weight is computed
    first. The codes are not trained, but gradients pass through to the inputs, and the bias has some.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        device: device of the codes and parameters.
        dtype: dtype in which the layer computes.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Attributes:
        codes: the buffer ``[out_features, in_features]`` in int8.
        scale: the buffer ``[out_features]`` in fp32, by which rows of codes are multiplied.
        weight: the product, computed and read-only.

    Examples:
        >>> linear = nn.Linear(512, 256)
        >>> small = lr.Int8Linear.from_dense(linear)
        >>> bool((small.weight - linear.weight).abs().max() <= small.scale.max() / 2)
        True
        >>> lr.layer_cost(linear).bytes, lr.layer_cost(small).bytes
        (525312, 133120)
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self._hold(out_features, in_features, device, dtype)
        own = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", own)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights as ``nn.Linear`` does, and rounds them."""
        if self.codes.is_meta:
            return
        bound = 1 / math.sqrt(max(1, self.in_features))
        new = torch.empty(self.codes.shape, device=self.codes.device).uniform_(-bound, bound)
        self.fill_(new, None if self.bias is None else torch.empty_like(self.bias).uniform_(-bound, bound))

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[*, in_features]`` to ``[*, out_features]``."""
        if not self._takes_kernel(input):
            return nn.functional.linear(input, self.dequantized(), self.bias)
        rows = _aligned(input.reshape(-1, self.in_features).contiguous())
        if self.codes.data_ptr() % KERNEL_ALIGNMENT:
            self.codes.data = _aligned(self.codes)  # the same tensor, as others may hold it
        out = torch._weight_int8pack_mm(rows, self.codes, self.scale.to(input.dtype))
        out = out.reshape(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _takes_kernel(self, input: Tensor) -> bool:
        """Whether torch's int8 kernel computes this product, right and faster; it has no gradients."""
        if torch.compiler.is_compiling() or torch._C._is_tracing() or not input.is_cpu:
            return False
        if input.dtype != self.dtype or input.dtype not in (torch.bfloat16, torch.float16) or not input.numel():
            return False
        if input.shape[-1] != self.in_features or self.in_features % KERNEL_BLOCK:
            return False
        if input.numel() > KERNEL_ROWS * self.in_features or not self.codes.is_contiguous():
            return False
        special = torch.is_autocast_enabled("cpu") or _functorch.maybe_current_level() is not None
        differentiated = (torch.is_grad_enabled() and input.requires_grad) or forward_ad._current_level >= 0
        return not (special or differentiated) and type(input) is Tensor

    @classmethod
    def like(cls, dense: nn.Module, *, rank: None = None, bias: bool | None = None) -> Int8Linear:
        """Builds an **uninitialized** layer with the settings, device and dtype of ``dense``.

        Args:
            dense: the layer to imitate.
            rank: ``None``.
            bias: whether the layer has a bias; by default it has one if ``dense`` does.
        """
        assert isinstance(dense, nn.Linear)
        with_bias = dense.bias is not None if bias is None else bias
        return cls(dense.in_features, dense.out_features, with_bias, "meta", dense.weight.dtype)._adopted(dense)

    def to_dense(self) -> nn.Linear:
        """Returns the ``nn.Linear`` that computes the same."""
        place: dict[str, Any] = {"device": self.codes.device, "dtype": self.dtype}
        sizes = (self.in_features, self.out_features, self.bias is not None)
        dense = self._returned(nn.utils.skip_init(nn.Linear, *sizes, **place))
        assert isinstance(dense, nn.Linear)
        return dense


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where the kernel can read it."""
    return tensor.clone() if tensor.data_ptr() % KERNEL_ALIGNMENT else tensor
