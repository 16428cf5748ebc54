"""The one gate through which every tensor enters a factorization."""

from typing import Protocol

import torch
from torch import Tensor

from ..errors import LowRankError


def check_tensor(tensor: Tensor, who: str, *, ndim: int | None = None) -> Tensor:
    """Returns ``tensor`` detached, or says why it cannot be factorized.

    Args:
        tensor: what to look at.
        who: the caller (a function or a layer's name), which opens the message.
        ndim: the number of dimensions that is expected; ``None`` takes two or more.

    Raises:
        LowRankError: if it is no dense floating-point tensor with finite entries, is empty, lies on the
            meta device or has another number of dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise LowRankError(f"{who}: got {type(tensor).__name__}, expected a torch.Tensor.")
    if tensor.layout != torch.strided:
        raise LowRankError(f"{who}: got a tensor of layout {tensor.layout}, expected a dense one; call to_dense().")
    if not tensor.is_floating_point():
        raise LowRankError(
            f"{who}: got {tensor.dtype}, expected a floating-point tensor; convert it with .float()"
            " (dequantize integer weights first)."
        )
    if (tensor.ndim < 2) if ndim is None else (tensor.ndim != ndim):
        expected = "at least 2" if ndim is None else str(ndim)
        raise LowRankError(f"{who}: got shape {tuple(tensor.shape)}, expected {expected} dimensions.")
    if tensor.numel() == 0:
        raise LowRankError(f"{who}: got an empty tensor of shape {tuple(tensor.shape)}; there is nothing to do.")
    if tensor.is_meta:
        raise LowRankError(
            f"{who}: got a tensor on the meta device, which has no values; load the weights first"
            " (to_empty, then load_state_dict)."
        )
    tensor = tensor.detach()
    if not bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()):
        raise LowRankError(f"{who}: got NaN or Inf entries; find the step that produced them before factorizing.")
    return tensor


class _HasDtype(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


def working_dtype(tensor: _HasDtype) -> torch.dtype:
    """The dtype to compute in: fp64 stays, anything shorter is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def narrowed(tensor: Tensor, dtype: torch.dtype, who: str) -> Tensor:
    """The result in the dtype of the input, or an error where that cannot hold it.

    Raises:
        LowRankError: for entries that would become Inf.
    """
    narrow = tensor.to(dtype)
    if dtype != tensor.dtype and not bool(torch.isfinite(narrow).all()):
        raise LowRankError(
            f"{who}: the result has entries up to {float(tensor.abs().max()):.4g}, which {dtype}, the dtype of the"
            " input, cannot hold; convert the input with .float(), or scale it down."
        )
    return narrow
