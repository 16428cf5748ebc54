"""Walking over a model: which modules it has, under which names, and whether it can be operated on at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import LowRankError
from ..layers import FactoredModule, LowRankMultiheadAttention, is_derived, is_factored, peculiarity

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
    for inner, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise LowRankError(
                f"{inner!r} is not initialized yet, as in lazy modules such as nn.LazyLinear; run one batch through the"
                " model first, so that its shapes are known."
            )
    for inner, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter and not (quantized and is_quantized(parameter)):
            raise LowRankError(
                f"{inner!r} is a {type(parameter).__name__}, expected a plain parameter; factorize before sharding"
                " (fully_shard) and before quantizing, or load the full state dict into an unsharded model."
            )
    return model


def is_quantized(weight: Tensor) -> bool:
    """Whether it is a tensor of another kind that holds fewer bits and can be dequantised, as torchao's are."""
    return type(weight).dequantize is not Tensor.dequantize and is_traceable_wrapper_subclass(weight)


def check_factors(model: nn.Module) -> None:
    """Refuses factored layers whose children no longer hold their weight as a parameter."""
    for name, module in walk_layers(model):
        for key, child in module.named_children() if is_factored(module) else ():
            if not isinstance(child._parameters.get("weight"), Tensor):
                raise LowRankError(
                    f"{name!r}: the weight of its child {key!r} ({type(child).__name__}) is no plain parameter; fold"
                    " parametrizations and pruning first, and do this before quantizing."
                )


def walk_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its first name, without descending into factored ones."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        yield name, module
        if is_factored(module):
            inside = (*inside, f"{name}." if name else "")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def reason_to_keep(module: nn.Module) -> str | None:
    """Why a dense layer cannot be replaced without losing something, in words; ``None`` where it can."""
    if is_derived(module):
        return "its weight is computed (parametrized or normed); fold it to factorize it"
    strange = peculiarity(module)
    if strange is not None:
        return strange
    if any(getattr(module, kind) for kind in _HOOKS):
        return "it carries hooks, which a replacement would drop"
    for key, parameter in module.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {key} carries a gradient hook, which a replacement would drop"
    return None


def check_removable(model: nn.Module) -> None:
    """Raises if a factored layer or a part of it carries hooks or was changed, which multiplying out would lose."""
    for name, module in walk_layers(model):
        parts = module.parts if isinstance(module, FactoredModule) else list(module.children())
        for part in [module, *parts] if isinstance(module, (FactoredModule, LowRankMultiheadAttention)) else []:
            reason = peculiarity(part)
            if reason is None and any(getattr(part, kind) for kind in _HOOKS):
                reason = "it carries hooks; remove them first"
            if reason is not None:
                inside = "" if part is module else f", {type(part).__name__} inside"
                raise LowRankError(f"{name!r}{inside}: cannot be multiplied out: {reason}.")


def put_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Puts modules in the place of others, under all the names that those have; the names must be known."""
    if not replacements:
        return
    aliases = {name: names for names in module_aliases(model).values() for name in names}
    # resolve every place first: an alias may lie below another replaced name
    places = [
        (model.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2], new)
        for name, new in replacements.items()
        for alias in aliases[name]
    ]
    for parent, attribute, new in places:
        parent._modules[attribute] = new


def module_aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of every module."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return dict(names)
