"""Taking some of the outputs or inputs of a layer, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers import weight_of


def take_outputs_(layer: nn.Module, units: Tensor) -> None:
    """Leaves a linear layer, a convolution or a batch norm with some of its outputs."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor):
            _put_(layer, name, tensor.detach()[units])
    for name in ("out_features", "out_channels", "num_features"):
        if hasattr(layer, name):
            setattr(layer, name, len(units))


def put_inputs_(layer: nn.Module, matrix: Tensor) -> None:
    """Gives a linear layer or a convolution another matrix, ``[out, in * area]``, which may have fewer inputs."""
    old = weight_of(layer)
    weight = matrix.reshape(len(old), -1, *old.shape[2:])
    _put_(layer, "weight", weight)
    for name in ("in_features", "in_channels"):
        if hasattr(layer, name):
            setattr(layer, name, weight.shape[1])


def columns_of(layer: nn.Module, units: Tensor, count: int) -> Tensor:
    """Returns the columns of a layer's matrix that belong to some of the ``count`` units that it reads, in order."""
    columns = torch.arange(weight_of(layer)[0].numel(), device=units.device)
    return columns.reshape(count, -1)[units].flatten()


def _put_(layer: nn.Module, name: str, values: Tensor) -> None:
    old = getattr(layer, name)
    values = values.to(old).contiguous()
    setattr(layer, name, nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values)
