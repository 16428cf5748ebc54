"""Checks that a model can be modified in place, and that its factored layers can be multiplied out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import LowRankError
from ..layers import FactoredModule, LowRankMultiheadAttention, is_compressed, is_int8, peculiarity
from .reasons import has_hooks
from .tree import walk_layers

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def check_model(model: object, *, quantized: bool = False) -> nn.Module:
    """Raises if the model cannot be modified in place: it is wrapped, compiled, scripted, sharded, lazy or quantized.

    Args:
        model: what is checked, and returned.
        quantized: whether quantized weights are allowed.

    Raises:
        LowRankError: with the name of what is in the way, and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise LowRankError(f"got {type(model).__name__}, expected a torch.nn.Module.")
    name = type(model).__name__
    if name in _WRAPPERS:
        raise LowRankError(f"got a model wrapped in {name}; pass model.module, and wrap it again afterwards.")
    if isinstance(model, torch.jit.ScriptModule):
        raise LowRankError("got a scripted model, whose layers cannot be replaced; pass the original module.")
    if hasattr(model, "_orig_mod"):
        raise LowRankError("got a compiled model; pass model._orig_mod, and compile it again afterwards.")
    for inner, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            raise LowRankError(
                f"{inner!r} is wrapped in {type(module).__name__}; factorize before wrapping, then wrap again."
            )
    parameters = list(model.named_parameters())
    for inner, tensor in (*parameters, *model.named_buffers()):
        if is_lazy(tensor):
            raise LowRankError(
                f"{inner!r} is not initialized yet, as in lazy modules such as nn.LazyLinear; run one batch through the"
                " model first, so that its shapes are known."
            )
    for inner, parameter in parameters:
        if type(parameter) is not nn.Parameter and not (quantized and is_quantized(parameter)):
            raise LowRankError(
                f"{inner!r} is a {type(parameter).__name__}, expected a plain parameter; factorize before sharding"
                " (fully_shard) and before quantizing, or load the full state dict into an unsharded model."
            )
    return model


def is_quantized(weight: Tensor) -> bool:
    """Whether the weight is a tensor subclass that holds fewer bits and can be dequantized, such as torchao's."""
    return type(weight).dequantize is not Tensor.dequantize and is_traceable_wrapper_subclass(weight)


def check_factors(model: nn.Module) -> None:
    """Raises if a child of a factored layer no longer holds its weight as a parameter, or in int8."""
    for name, module in walk_layers(model):
        for key, child in module.named_children() if is_compressed(module) else ():
            if not is_int8(child) and not isinstance(child._parameters.get("weight"), Tensor):
                raise LowRankError(
                    f"{name!r}: the weight of its child {key!r} ({type(child).__name__}) is no plain parameter; fold"
                    " parametrizations and pruning first, and do this before quantizing."
                )


def check_densifiable(model: nn.Module) -> None:
    """Raises if a factored layer, or a child of it, carries hooks or was changed: multiplying out would lose that."""
    for name, module in walk_layers(model):
        parts = module.parts if isinstance(module, FactoredModule) else list(module.children())
        for part in [module, *parts] if is_compressed(module) or isinstance(module, LowRankMultiheadAttention) else []:
            reason = peculiarity(part)
            if reason is None and has_hooks(part):
                reason = "it carries hooks; remove them first"
            if reason is not None:
                inside = "" if part is module else f", {type(part).__name__} inside"
                raise LowRankError(f"{name!r}{inside}: cannot be multiplied out: {reason}.")
