"""Checks of tensors on their way into and out of a factorization."""

from typing import Protocol

import torch
from torch import Tensor

from ..errors import LowRankError


def check_tensor(tensor: Tensor, who: str, *, ndim: int | None = None) -> Tensor:
    """Returns a tensor detached, or raises if it cannot be factorized.

    Args:
        tensor: the tensor to check.
        who: name of the calling function or layer, for the message.
        ndim: expected number of dimensions; by default two or more.

    Raises:
        LowRankError: if it is not a dense floating-point tensor with finite entries, is empty, is on the meta device or
            has another number of dimensions.
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
        raise LowRankError(f"{who}: got an empty tensor of shape {tuple(tensor.shape)}; expected at least one entry.")
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
    """Returns the dtype to compute in: fp64 for fp64, fp32 for anything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def narrowed(tensor: Tensor, dtype: torch.dtype, who: str) -> Tensor:
    """Returns a result in the dtype of the input, or raises if that cannot represent it.

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


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor has neither NaN nor Inf, without another tensor of its size.

    Args:
        tensor: a tensor with entries.
    """
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
