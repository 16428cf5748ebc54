"""The class of a module with adapters: a subclass of its own class, so that the module stays the same object."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..layers import is_compressed
from ..layers.computed_weight import computed
from .adapted_weight import BANK, bank_of, banks_of, base_weight, values_of
from .forward import WITH_MORE, Fast, add_biases, fast_forward
from .mixed_groups import mixed_forward, mixes_groups
from .weight_layout import SLICES, dense_weight


class Adapted:
    """Mixed into the class of a module that has adapters: reading an adapted parameter gives it with all deltas.

    So whatever the module's own forward does with it (a fused attention, a recurrent kernel, padding, a fast path), it
    is right. Linear layers, convolutions and embeddings have a faster forward that never forms the delta.
    """

    _plain_class: type[nn.Module]
    _adapted_names: tuple[str, ...]

    def _load_from_state_dict(self, *args: Any) -> None:
        assert isinstance(self, nn.Module)
        for bank in banks_of(self).values():
            if bank.merged is not None or bank.disabled:
                state = (
                    "merged; call unmerge_lora_(model)" if bank.merged is not None else "disabled; leave the context"
                )
                raise LowRankError(f"load_state_dict: the adapters of this model are {state} before loading.")
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (self._plain_class, self._adapted_names), state

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Sets the base weight, whose shape must stay; an assignment of a parameter comes here."""
        if name in self._adapted_names:
            check_same_shape(self, name, param)
            self.__dict__.get("_former_parameters", {}).pop(name, None)
        super().register_parameter(name, param)  # type: ignore[misc]

    def lift_(self) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """Takes the adapters off; the function returned puts them on again, fitted to a vocabulary of another size."""
        module = cast(nn.Module, self)
        names, banks = self._adapted_names, banks_of(module)
        for bank in banks.values():
            bank.check_resizable(type(self).__name__)
        for name in banks:
            delattr(module, BANK.format(name))
        change_class_(module, self._plain_class)

        def restore(resized: nn.Module) -> nn.Module:
            for name, bank in banks.items():
                bank.resize_(base_weight(resized, name))
                resized.add_module(BANK.format(name), bank)
            change_class_(resized, adapted_class(type(resized), names))
            return resized

        return module, restore


def change_class_(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class of a module, also in the bound forward that accelerate's hooks keep on the instance."""
    before, module.__class__ = type(module).forward, cls
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is before:
            module.__dict__[name] = MethodType(cls.forward, module)


def check_same_shape(module: Any, name: str, value: Any) -> None:
    """Raises if a base weight is replaced by one that its adapters do not fit."""
    if dense_weight(module, name) is None and not is_compressed(module):
        return  # deleted before, as FullyShardedDataParallel does
    old, new = tuple(base_weight(module, name).shape), tuple(getattr(value, "shape", ()))
    if old != new:
        raise LowRankError(
            f"{type(module).__name__}: its {name} has adapters of shape {old}, so that it cannot be replaced by"
            f" {f'one of shape {new}' if new else value!r}; call remove_lora_ first, change the layer, and add the"
            " adapters again."
        )


def refuse_scripting() -> NoReturn:
    """Raises what ``torch.jit.script`` shows for a model with adapters, whose classes are made while it runs."""
    raise LowRankError(
        "torch.jit.script: the model has adapters, whose classes cannot be scripted; use torch.jit.trace or"
        " torch.export for the adapted model, or merge the adapters into a plain one first."
    )


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    adapted: nn.Module = object.__new__(adapted_class(cls, names))
    return adapted


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def adapted_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``cls`` in which the named parameters are read with their adapters."""
    if (cls, names) not in _CLASSES:
        _CLASSES[cls, names] = _make_class(cls, names)
    return _CLASSES[cls, names]


def _make_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _with_adapters(cls, name) for name in names}
    if any(name in SLICES for name in names):
        body["in_proj_weight"] = replaceable("in_proj_weight", _joined)
    body |= {"_plain_class": cls, "_adapted_names": names, "__module__": cls.__module__}
    fast = fast_forward(cls)
    if fast is not None and names == ("weight",):
        body["forward"] = _choose(cls, fast)
    if issubclass(cls, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda *_: None)
    return cast("type[nn.Module]", type(f"Lora{cls.__name__}", (Adapted, cls), body))


def _with_adapters(cls: type[nn.Module], name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        bank = bank_of(self, name)
        weight = base_weight(self, name)
        # fully_shard reads its shards by this name; in the forward pass the weight is whole
        if bank is None or type(weight).__name__ == "DTensor" or read_by_fsdp():
            return weight
        formed = bank.effective(values_of(weight))
        return formed if formed is weight else _guarded(self, name, formed)

    return replaceable(name, read)


def read_by_fsdp() -> bool:
    """Whether ``FullyShardedDataParallel`` reads a property, to compare the parameter with its own and to move it."""
    if torch.compiler.is_compiling():
        return False
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("torch.distributed.fsdp.")


def replaceable(name: str, read: Callable[[Any], Tensor]) -> property:
    """A computed parameter that may be deleted and set to a tensor, as that of a plain module may.

    ``nn.DataParallel`` sets copies on its replicas and lists them in ``_former_parameters``, where they are looked up;
    ``FullyShardedDataParallel`` sets views of what it gathered on every module, which are kept there too.
    """

    def write(self: nn.Module, value: Tensor) -> None:
        self.__dict__.setdefault("_former_parameters", {})[name] = value

    def delete(self: nn.Module) -> None:
        if name not in self.__dict__.get("_former_parameters", {}):
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
        del self.__dict__["_former_parameters"][name]

    return property(read, write, delete)


def _guarded(self: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A read weight as a tensor that refuses to be written to; torch's own forwards get a plain one.

    They leave their fast paths for anything but a plain tensor.
    """
    if torch.compiler.is_compiling():
        return weight
    reader = sys._getframe(2)
    if reader.f_code.co_name == "forward" and reader.f_globals.get("__name__", "").startswith("torch.nn.modules."):
        return weight
    where = f"dict(layer.named_parameters())[{name!r}]" if name in self._parameters else "its parameters"
    return computed(
        weight,
        f"{type(self).__name__}: its {name} is read with its adapters added, so that what is written to it would be"
        f" lost; write to the base ({where}), call merge_lora_ or remove_lora_ first, or take a copy with"
        " .detach().clone().",
    )


def _joined(self: nn.Module) -> Tensor:
    """A fused weight whose parts have adapters of their own."""
    parts = [getattr(self, name) if bank_of(self, name) else base_weight(self, name) for name in SLICES]
    return _guarded(self, "in_proj_weight", torch.cat(parts))


def _flat_weights(self: Any) -> list[Tensor | None]:
    if "_is_replica" in self.__dict__:  # of nn.DataParallel, which reads this while it still fills the replica
        return [getattr(self, name, None) for name in self._flat_weights_names]
    return [getattr(self, name) for name in self._flat_weights_names]


def _choose(cls: type[nn.Module], fast: Fast) -> Callable[..., Any]:
    """A forward that takes the fast path, or the class' own with the formed weight where there is a magnitude."""

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bank = self._modules.get("lora_weight")
        if bank is None:  # taken off, and whoever wrapped this forward still calls it
            plain: Tensor = cls.forward(self, input, *args, **kwargs)
            return plain
        formed = any(adapter.magnitude is not None for adapter in bank) and not is_compressed(self)
        formed = formed or getattr(self, "mode", None) == "max"  # the maximum of a bag is no linear function of it
        formed = formed or "_conv_forward" in self.__dict__  # replaced on the instance: it may change the weight
        if mixes_groups(bank):
            out: Tensor = mixed_forward(self, bank, input)
        elif bank.merged is not None or formed or ((args or kwargs) and fast not in WITH_MORE):
            out = cls.forward(self, input, *args, **kwargs)
        else:
            out = fast(cls, self, bank, input, *args, **kwargs)
        return add_biases(self, bank, out)

    return forward
