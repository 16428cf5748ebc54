"""``modules_to_save``: modules that an adapter trains whole, each in a copy of its own; the base stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import LowRankError
from .adapted_weight import base_modules
from .adapter import Bank, adapter_dtype
from .module_copies import COPIES, Copies, copies_in, copies_of
from .trained_whole import HALVES, TrainedWhole, whole_class


def find_whole(model: nn.Module, wanted: Iterable[str], name: str, who: str = "add_lora_") -> dict[str, nn.Module]:
    """The modules of these names, or ends of names, each of which an adapter can train whole.

    Containers (``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict``) stand for the modules in them.

    Raises:
        LowRankError: where there is none, or a module cannot be trained whole.
    """
    if isinstance(wanted, str):
        raise LowRankError(f"{who}: got modules_to_save={wanted!r}, expected a list; write [{wanted!r}].")
    modules = base_modules(model)
    found: dict[str, nn.Module] = {}
    for each in wanted:
        own = {owner: m for owner, m in modules.items() if owner and (owner == each or owner.endswith(f".{each}"))}
        if not own:
            raise LowRankError(f"{who}: modules_to_save has {each!r}, which matches no module of the model.")
        for owner, module in own.items():
            found |= dict(_opened(owner, module))
    outer = {o: m for o, m in found.items() if not any(o.startswith(f"{other}.") for other in found)}
    for owner, module in outer.items():
        trouble = _trouble(modules, owner, module, name)
        if trouble:
            raise LowRankError(f"{who}: modules_to_save has {owner!r}, which {trouble}.")
    return outer


def _opened(owner: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a container, which itself must not get one more child: it would run it."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or module._parameters:
        yield owner, module
        return
    for key, child in module.named_children():
        if child.state_dict():
            yield from _opened(f"{owner}.{key}", child)


def _trouble(modules: dict[str, nn.Module], owner: str, module: nn.Module, name: str) -> str | None:
    """Why a module cannot be trained whole, in words."""
    above = [modules[owner[:k]] for k, letter in enumerate(owner) if letter == "." and owner[:k] in modules]
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; script the model after training instead"
    copies = copies_in(module)
    if copies is not None and name in copies:
        return f"the adapter {name!r} trains already; give another name"
    if any(isinstance(outer, TrainedWhole) for outer in above):
        return "lies in a module that another adapter trains whole; name that one"
    if any(isinstance(part, Bank) for part in module.modules()):
        return "has adapters; take them off first, or leave it out"
    if any(isinstance(part, Copies) for part in module.modules() if part is not copies):
        return "has a module in it that another adapter trains whole; name that one"
    if owner.endswith("out_proj") and isinstance(above[-1] if above else None, nn.MultiheadAttention):
        return "an nn.MultiheadAttention reads without calling it; name the attention"
    if "forward" in module.__dict__:
        return "has a forward of its own on the instance (an offloading hook, or a patch); take that off first"
    if isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward:
        return (
            f"is a {type(module).__name__} with parameters of its own, which cannot get a copy; name the modules in it"
        )
    if not module.state_dict():
        return f"is a {type(module).__name__} without parameters"
    return None


def attach_whole_(
    module: nn.Module, name: str, own: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Gives an adapter its copy of a module, which is used from now on; returns the copy.

    Args:
        module: the module that is trained whole.
        name: name of the adapter.
        own: the copy; ``None`` makes one.
        dtype: dtype of a copy that is made, as in :func:`plain_copy`.
    """
    copies = copies_in(module)
    if own is None:
        own = plain_copy(module, dtype)
    if copies is None:
        copies = Copies().train(module.training)
        module.add_module(COPIES, copies)
        names = tuple(key for key, parameter in module._parameters.items() if parameter is not None)
        module.__class__ = whole_class(type(module), names)
        module._lora_whole_hook = module.register_load_state_dict_post_hook(_without_copies)
    copies[name] = own.train(module.training)
    copies.choose([name])
    return own


def plain_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module without its other copies, all of which learns.

    Args:
        module: the module.
        dtype: dtype of what is in half precision; ``None`` is fp32.
    """
    plain = _own_copy(module)
    plain._apply(lambda t: t.to(adapter_dtype(t, dtype)) if t.dtype in HALVES else t)
    return plain.requires_grad_(True)


def _own_copy(module: nn.Module) -> nn.Module:
    if not isinstance(module, TrainedWhole):
        return copy.deepcopy(module)
    hidden = module._modules.pop(COPIES)
    try:
        own: Any = copy.deepcopy(module)
    finally:
        module._modules[COPIES] = hidden
    own.__class__ = own._plain_class
    own.__dict__.pop("_lora_whole_hook").remove()
    plain: nn.Module = own
    return plain


def drop_whole_(model: nn.Module, name: str | None) -> None:
    """Takes the copies of one adapter off, in place, or those of all."""
    for owner, copies in copies_of(model).items():
        for own in [own for own in copies if name in (None, own)]:
            del copies[own]
        if not len(copies):
            _detach(model.get_submodule(owner))
        elif copies.active is not None and copies.active not in copies:
            copies.active = None


def adopt_whole_(model: nn.Module) -> None:
    """Puts every copy in use in the place of its module's own values; tied parameters become the module's own."""
    for owner, copies in copies_of(model).items():
        module = model.get_submodule(owner)
        own = None if copies.active is None else copies[copies.active]
        _detach(module)
        if own is not None:
            before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for key, tensor in (*own.named_parameters(), *own.named_buffers()):
                tensor.data = tensor.data.to(before[key].dtype)
            for kind in ("_parameters", "_buffers", "_modules"):
                module.__dict__[kind].update(own.__dict__[kind])


def _detach(module: nn.Module) -> None:
    plain: Any = module
    del plain._modules[COPIES]
    plain.__class__ = plain._plain_class
    plain.__dict__.pop("_lora_whole_hook").remove()


def _without_copies(module: nn.Module, incompatible: Any) -> None:
    """Lets a state dict of the base fit: copies that it does not mention stay as they are."""
    copies = copies_in(module)
    untouched = () if copies is None else tuple(copies.untouched)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(untouched)]
