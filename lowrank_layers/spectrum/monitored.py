"""Which matrices of a model are monitored: weights, their gradients, and the deltas of LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..layers import ConvNd, FactoredModule
from ..lora.adapted_weight import banks_of, base_modules, values_of
from ..lora.adapter import Adapter
from ..lora.weight_layout import WeightLayout
from ..modules import Selector, select
from .record import Kind


@dataclass(frozen=True)
class Monitored:
    """A matrix of a model.

    Args:
        kind: what it is.
        name: the parameter's name; of a delta, with that of the adapter.
        sharded: whether it is made of DTensors, so that every process has to call ``read``.
        read: returns the values as ``[m, n]``.
    """

    kind: Kind
    name: str
    sharded: bool
    read: Callable[[], Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or "_orig_mod" in model._modules:
        wrapped = isinstance(model, (DistributedDataParallel, DataParallel))
        model = model.module if wrapped else model._orig_mod  # type: ignore[assignment]
    return model


def monitored(model: nn.Module, target: Sequence[Selector] | None, gradients: bool) -> Iterator[Monitored]:
    """Yields the matrices of a model that are monitored.

    Args:
        model: the model.
        target: selectors of layers and of modules with layers inside; by default all that are trained.
        gradients: whether to yield the gradients that are there.
    """
    chosen = None if target is None else select(model, target, "SpectrumMonitor: target")
    seen: set[nn.Parameter] = set()
    for owner, module in base_modules(model).items():
        if chosen is not None and not _is_within(owner, chosen):
            continue
        prefix = f"{owner}.".replace("_orig_mod.", "") if owner else ""
        if isinstance(module, FactoredModule):
            factors = list(module.parameters())
            if chosen is not None or any(factor.requires_grad for factor in factors):
                sharded = any(map(_is_sharded, factors))
                yield Monitored("weights", f"{prefix}weight", sharded, partial(_product, module))
        for key, parameter in module._parameters.items():
            if parameter is None or parameter in seen or not _is_matrix(module, parameter):
                continue
            seen.add(parameter)  # a shared one is measured once
            if chosen is None and not parameter.requires_grad:
                continue
            name, sharded = f"{prefix}{key}", _is_sharded(parameter)
            yield Monitored("weights", name, sharded, partial(_whole, parameter))
            if gradients and parameter.grad is not None:
                yield Monitored("gradients", name, sharded, partial(_whole, parameter.grad))
        for key, bank in banks_of(module).items():
            for label, adapter in bank.adapters.items():
                assert isinstance(adapter, Adapter)
                read = partial(_delta, adapter, bank.layout)
                yield Monitored("deltas", f"{prefix}{key}/{label}", _is_sharded(adapter.A), read)


def _is_within(name: str, chosen: set[str]) -> bool:
    """Whether a module or one that it lies in is chosen."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in chosen for depth in range(len(parts) + 1))


def _is_matrix(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix or the kernel of a convolution."""
    return parameter.ndim == 2 or (parameter.ndim > 2 and isinstance(module, ConvNd))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, without importing it


def gathered(tensor: Tensor) -> Tensor:
    """The tensor detached, whole where it is a DTensor; then every process has to call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> Tensor:
    """The values of a parameter or gradient, gathered and dense, as ``[m, n * ...]``."""
    full = values_of(gathered(tensor))
    return (full if full.layout == torch.strided else full.to_dense()).flatten(1)


def _product(module: FactoredModule) -> Tensor:
    return _whole(module.product())


def _delta(adapter: Adapter, layout: WeightLayout) -> Tensor:
    """``scaling (B A - B0 A0)`` in fp32 or wider, of sharded factors as well."""
    dtype = torch.promote_types(adapter.A.dtype, torch.float32)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return layout.product(gathered(a).to(dtype), gathered(b).to(dtype))

    delta = product(adapter.A, adapter.B)
    if adapter.a0 is not None and adapter.b0 is not None:
        delta = delta - product(adapter.a0, adapter.b0)
    return _whole(delta * adapter.scaling.to(dtype))
