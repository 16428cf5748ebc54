"""The class of a module that adapters train whole: its forward is that of the copy in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import LowRankError
from ..layers.computed_weight import computed
from .adapted import read_by_fsdp, refuse_scripting, replaceable
from .module_copies import COPIES, Copies, copies_in
from .weight_layout import parameter_of

HALVES = (torch.bfloat16, torch.float16)


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
        """Sets a parameter of the module itself, also where a plain tensor stands in its place."""
        self.__dict__.get("_former_parameters", {}).pop(name, None)
        super().register_parameter(name, param)  # type: ignore[misc]


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    blank: nn.Module = object.__new__(whole_class(cls, names))
    return blank


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def whole_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward is that of the copy in use, and whose named parameters are that copy's."""
    if (cls, names) not in _CLASSES:
        body: dict[str, Any] = {name: _in_use(name) for name in names}
        body |= {"_plain_class": cls, "_own_names": names, "__module__": cls.__module__, "forward": _forward_of(cls)}
        _CLASSES[cls, names] = cast("type[nn.Module]", type(f"Whole{cls.__name__}", (TrainedWhole, cls), body))
    return _CLASSES[cls, names]


def _in_use(name: str) -> property:
    """A property that reads the parameter of the copy in use, for code that does not call the module."""

    def read(self: nn.Module) -> Tensor:
        copies, base = copies_in(self), parameter_of(self, name)
        if base is None:
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
        if copies is None or copies.disabled or copies.rows is not None or copies.active is None:
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
            f" dict(layer.named_parameters())['{COPIES}.{copies.active}.{name}'].",
        )

    return replaceable(name, read)


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        copies = cast(Copies, self._modules[COPIES])
        if copies.disabled:
            return cls.forward(self, *args, **kwargs)
        if copies.rows is not None:
            return _by_rows(cls, self, copies, copies.rows, *args, **kwargs)
        if copies.active is None:
            return cls.forward(self, *args, **kwargs)
        return _run(self, copies[copies.active], *args, **kwargs)

    return forward


def _run(base: nn.Module, own: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of a copy; one in fp32 of a module in half precision runs under autocast, to the module's dtype."""
    first, theirs = (next(_parameters(module), None) for module in (base, own))
    if first is None or first.dtype not in HALVES or theirs is None or theirs.dtype == first.dtype:
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
    """The output with each row of the batch run through the copy of its own adapter."""
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
