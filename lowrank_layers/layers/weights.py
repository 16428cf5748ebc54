"""Typed access to the weight and bias of a module, and copies of modules on the meta device."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def weight_of(module: nn.Module) -> Tensor:
    """Returns ``module.weight``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Returns ``module.bias``, or ``None`` if the module has no bias."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def meta_twin(module: Module) -> Module:
    """Copies a module and its children to the meta device, without values."""
    twin: Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        key: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for key, p in module._parameters.items()
    }
    twin._buffers = {key: None if b is None else b.to("meta") for key, b in module._buffers.items()}
    twin._modules = {key: None if child is None else meta_twin(child) for key, child in module._modules.items()}
    return twin
