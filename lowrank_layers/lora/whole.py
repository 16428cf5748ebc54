"""Modules that are trained whole beside the adapters: every adapter has a copy of its own, the base stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import LowRankError
from ..layers.computed import computed
from ..modules import walk_layers
from .adapted import read_by_fsdp, refuse_scripting, replaceable
from .adapter import Bank, adapter_dtype
from .learning import let_learn_
from .weight_layout import parameter_of

_ACTIVE = "active"
_HALVES = (torch.bfloat16, torch.float16)
WHOLE_COPIES = "lora_whole"
"""The child that holds the copies of a module: ``head.lora_whole.default.weight``."""


class Copies(nn.ModuleDict):
    """The copies of one module by the names of adapters, and which of them is in use (``None``: the module itself).

    The state dict holds the choice too: a one for the copy in use, zeros for the others, in the order of their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.rows: list[str | None] | None = None  # a name for each row of a batch
        self.disabled = False
        self.untouched: list[str] = []  # prefixes of the copies that the state dict loaded last does not mention

    def choose(self, names: Iterable[str]) -> None:
        """Uses the copy of one of these adapters; only that one learns."""
        self.active = next((name for name in names if name in self), None)
        for name, own in self.items():
            let_learn_(own, name == self.active)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "disabled": False, "active": None if self.disabled else self.active}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        active = None if self.disabled else self.active
        destination[prefix + _ACTIVE] = torch.tensor([float(name == active) for name in sorted(self)])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        others = {key: value for key, value in state_dict.items() if key != prefix + _ACTIVE}
        super()._load_from_state_dict(others, prefix, *args)
        mentioned = sorted({key.removeprefix(prefix).split(".")[0] for key in others if key.startswith(prefix)})
        self.untouched = [f"{prefix}{name}." for name in self if name not in mentioned]
        flags = state_dict.get(prefix + _ACTIVE)
        if flags is None and mentioned:
            args[2].append(prefix + _ACTIVE)  # the missing keys
        elif flags is not None:
            self.choose([name for name, flag in zip(mentioned, flags.tolist(), strict=False) if flag])


class TrainedWhole:
    """Mixed into the class of a module that has copies: its forward is that of the copy in use."""

    _plain_class: type[nn.Module]
    _own_names: tuple[str, ...]
    skipped_by_fast_paths = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (self._plain_class, self._own_names), state

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter takes the place of a tensor that was set meanwhile."""
        self.__dict__.get("_former_parameters", {}).pop(name, None)
        super().register_parameter(name, param)  # type: ignore[misc]


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    blank: nn.Module = object.__new__(_whole_class(cls, names))
    return blank


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _whole_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (cls, names) not in _CLASSES:
        body: dict[str, Any] = {name: _in_use(name) for name in names}
        body |= {"_plain_class": cls, "_own_names": names, "__module__": cls.__module__, "forward": _forward_of(cls)}
        _CLASSES[cls, names] = cast("type[nn.Module]", type(f"Whole{cls.__name__}", (TrainedWhole, cls), body))
    return _CLASSES[cls, names]


def _in_use(name: str) -> property:
    """Reading a parameter gives that of the copy in use, for whoever does not call the module."""

    def read(self: nn.Module) -> Tensor:
        copies, base = self._modules.get(WHOLE_COPIES), parameter_of(self, name)
        if base is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
        if not isinstance(copies, Copies) or copies.disabled or copies.rows is not None or copies.active is None:
            return base
        if read_by_fsdp():
            return base
        own = parameter_of(copies[copies.active], name)
        assert own is not None
        if own.dtype == base.dtype:
            return own
        return computed(
            own.to(base.dtype),
            f"{type(self).__name__}: its {name} is a copy of an adapter, read in the dtype of the model; write to"
            f" dict(layer.named_parameters())['{WHOLE_COPIES}.{copies.active}.{name}'].",
        )

    return replaceable(name, read)


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        copies = cast(Copies, self._modules[WHOLE_COPIES])
        if copies.disabled:
            return cls.forward(self, *args, **kwargs)
        if copies.rows is not None:
            return _by_rows(cls, self, copies, copies.rows, *args, **kwargs)
        if copies.active is None:
            return cls.forward(self, *args, **kwargs)
        return _run(self, copies[copies.active], *args, **kwargs)

    return forward


def _run(base: nn.Module, own: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a copy gives; one in fp32 of a module in half precision runs under autocast, to the module's dtype."""
    first, theirs = (next(_parameters(module), None) for module in (base, own))
    if first is None or first.dtype not in _HALVES or theirs is None or theirs.dtype == first.dtype:
        return own(*args, **kwargs)
    if torch.is_autocast_enabled(first.device.type):
        return own(*args, **kwargs)
    with torch.autocast(first.device.type, first.dtype):
        out = own(*args, **kwargs)
    return tree_map(lambda t: t.to(first.dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t, out)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of a module; of a replica of ``nn.DataParallel``, which has none, the copies."""
    for part in module.modules():
        yield from (p for p in part._parameters.values() if p is not None)
        yield from part.__dict__.get("_former_parameters", {}).values()


def _by_rows(
    cls: type[nn.Module], self: nn.Module, copies: Copies, rows: list[str | None], input: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Each row of the batch through the copy of its adapter."""
    result: Tensor | None = None
    for name in dict.fromkeys(rows):
        if not isinstance(input, Tensor) or len(input) != len(rows):
            got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise LowRankError(f"lora_rows: got an input of {got}, expected a tensor of {len(rows)} rows.")
        index = torch.tensor([k for k, own in enumerate(rows) if own == name], device=input.device)
        part = input[index]
        own = None if name is None or name not in copies else copies[name]
        out = cls.forward(self, part, *args, **kwargs) if own is None else _run(self, own, part, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise LowRankError(
                f"lora_rows: a {cls.__name__} that is trained whole returned a {type(out).__name__}, expected a tensor"
                " with one row per sample; run the adapters one after the other with use_adapter."
            )
        result = out.new_zeros(len(rows), *out.shape[1:]) if result is None else result
        result = result.index_copy(0, index, out)
    assert result is not None
    return result


def copies_of(model: nn.Module) -> dict[str, Copies]:
    """The copies of every module that is trained whole, by the module's name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, TrainedWhole)}
    return {name: cast(Copies, cast(nn.Module, module)._modules[WHOLE_COPIES]) for name, module in found.items()}


def check_choice(model: nn.Module, names: Iterable[str]) -> None:
    """Refuses to use two copies of one module at once.

    Raises:
        LowRankError: naming the module and the adapters.
    """
    wanted = list(names)
    for owner, copies in copies_of(model).items():
        both = [name for name in wanted if name in copies]
        if len(both) > 1:
            raise LowRankError(
                f"use_adapter: {owner!r} is trained whole by each of the adapters {both}, and only one of these copies"
                " can be used; choose one of the adapters."
            )


def find_whole(model: nn.Module, wanted: Iterable[str], name: str, who: str = "add_lora_") -> dict[str, nn.Module]:
    """The modules of these names, or ends of names, once it is sure that an adapter can train each of them whole.

    Containers (``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict``) stand for the modules in them.

    Raises:
        LowRankError: where there is none, or a module cannot be trained whole.
    """
    if isinstance(wanted, str):
        raise LowRankError(f"{who}: got modules_to_save={wanted!r}, expected a list; write [{wanted!r}].")
    modules = {owner: module for owner, module in walk_layers(model) if ".lora_" not in f".{owner}."}
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
    """What is to be copied of a container: it runs its children, and must not get one more."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or module._parameters:
        yield owner, module
        return
    for key, child in module.named_children():
        if child.state_dict():
            yield from _opened(f"{owner}.{key}", child)


def _trouble(modules: dict[str, nn.Module], owner: str, module: nn.Module, name: str) -> str | None:
    """Why a module cannot be trained whole."""
    above = [modules[owner[:k]] for k, letter in enumerate(owner) if letter == "." and owner[:k] in modules]
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted; script the model after training instead"
    copies = module._modules.get(WHOLE_COPIES)
    if isinstance(copies, Copies) and name in copies:
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
    """Gives an adapter its copy of a module, which is then the one in use; returns the copy."""
    copies = module._modules.get(WHOLE_COPIES)
    if own is None:
        own = plain_copy(module, dtype)
    if not isinstance(copies, Copies):
        copies = Copies().train(module.training)
        module.add_module(WHOLE_COPIES, copies)
        names = tuple(key for key, parameter in module._parameters.items() if parameter is not None)
        module.__class__ = _whole_class(type(module), names)
        module._lora_whole_hook = module.register_load_state_dict_post_hook(_without_copies)
    copies[name] = own.train(module.training)
    copies.choose([name])
    return own


def plain_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module as it was before it had copies, all of which learns; in fp32 where it is in half precision,
    unless another dtype is asked for.
    """
    plain = _own_copy(module)
    plain._apply(lambda t: t.to(adapter_dtype(t, dtype)) if t.dtype in _HALVES else t)
    return plain.requires_grad_(True)


def _own_copy(module: nn.Module) -> nn.Module:
    if not isinstance(module, TrainedWhole):
        return copy.deepcopy(module)
    hidden = module._modules.pop(WHOLE_COPIES)
    try:
        own: Any = copy.deepcopy(module)
    finally:
        module._modules[WHOLE_COPIES] = hidden
    own.__class__ = own._plain_class
    own.__dict__.pop("_lora_whole_hook").remove()
    plain: nn.Module = own
    return plain


def drop_whole_(model: nn.Module, name: str | None) -> None:
    """Takes the copies of one adapter off, or of all."""
    for module in [module for module in model.modules() if isinstance(module, TrainedWhole)]:
        assert isinstance(module, nn.Module)
        copies = cast(Copies, module._modules[WHOLE_COPIES])
        for own in [own for own in copies if name in (None, own)]:
            del copies[own]
        if not len(copies):
            _detach(module)
        elif copies.active is not None and copies.active not in copies:
            copies.active = None


def adopt_whole_(model: nn.Module) -> None:
    """Makes every copy in use the module itself; a tied parameter is parted from its other owners."""
    for module in [module for module in model.modules() if isinstance(module, TrainedWhole)]:
        assert isinstance(module, nn.Module)
        copies = cast(Copies, module._modules[WHOLE_COPIES])
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
    del plain._modules[WHOLE_COPIES]
    plain.__class__ = plain._plain_class
    plain.__dict__.pop("_lora_whole_hook").remove()


def _without_copies(module: nn.Module, incompatible: Any) -> None:
    """A state dict of the base fits: copies that it does not mention stay as they are."""
    untouched = tuple(cast(Copies, module._modules[WHOLE_COPIES]).untouched)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.startswith(untouched)]
