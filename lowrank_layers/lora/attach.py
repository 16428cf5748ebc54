"""Putting adapters on single weights of a model, taking them off, and which parameters learn meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import LowRankError
from ..modules import update_shortcuts_
from .adapted import adapted_class, change_class_
from .adapted_weight import BANK, AdaptedWeight, adapted_weights
from .adapter import Adapter, Bank
from .module_copies import copies_of
from .modules_to_save import drop_whole_

_LEARNED = "_learned_before_lora"


@contextmanager
def adapting(model: nn.Module) -> Iterator[None]:
    """Within it adapters of a model change: it is frozen before the first one, and shortcuts are up to date afterwards.

    Later adapters freeze nothing: what was thawed after the first one stays so, as in PEFT. What learned before the
    first one is remembered on the model.
    """
    if _LEARNED not in model.__dict__:
        own = {id(p) for part in (*banks(model), *copies_of(model).values()) for p in part.parameters()}
        learned = model.__dict__[_LEARNED] = {}
        for name, parameter in model.named_parameters():
            if id(parameter) not in own:
                learned[name] = parameter.requires_grad
                parameter.requires_grad_(False)
    yield
    update_shortcuts_(model)


def attach_(weight: AdaptedWeight, name: str, adapter: Adapter) -> None:
    """Puts one adapter on a weight, in place; a module without adapters so far becomes an adapted one."""
    module = weight.module
    if not weight.is_adapted:
        bank = Bank(weight.layout)
        names = (*getattr(module, "_adapted_names", ()), weight.parameter)
        plain = getattr(module, "_plain_class", type(module))
        module.add_module(BANK.format(weight.parameter), bank.train(module.training))
        change_class_(module, adapted_class(plain, names))
    weight.bank.add(name, adapter.train(module.training))


def detach_(weight: AdaptedWeight) -> None:
    """Takes all adapters off a weight, in place; the module becomes plain if this was its last adapted weight."""
    adapted: Any = weight.module
    delattr(adapted, BANK.format(weight.parameter))
    plain = adapted._plain_class
    names = tuple(each for each in adapted._adapted_names if each != weight.parameter)
    change_class_(adapted, adapted_class(plain, names) if names else plain)


def strip_(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter off, or all of them; after the last one everything learns that learned before the first."""
    for weight in adapted_weights(model):
        for each in [own for own in weight.bank.names if name in (None, own)]:
            weight.bank.drop(each)
        if not weight.bank.names:
            detach_(weight)
    drop_whole_(model, name)
    if not banks(model) and not copies_of(model):
        learned = model.__dict__.pop(_LEARNED, {})
        for own, parameter in model.named_parameters():
            if own in learned:
                parameter.requires_grad_(learned[own])
    update_shortcuts_(model)


def banks(model: nn.Module) -> list[Bank]:
    """The adapters of every adapted weight of a model."""
    return [module for module in model.modules() if isinstance(module, Bank)]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, sorted."""
    names = {own for bank in banks(model) for own in bank.names}
    return sorted(names | {own for copies in copies_of(model).values() for own in copies})


def check_new_name(name: str, who: str) -> None:
    """Raises if an adapter cannot be called so."""
    if not isinstance(name, str) or not name or "." in name:
        raise LowRankError(f"{who}: got name {name!r}, expected a string without dots.")


def check_name(model: nn.Module, name: str) -> None:
    """Raises if the model has no adapter of that name."""
    known = adapter_names(model)
    if name not in known:
        raise LowRankError(f"got the adapter {name!r}, expected one of {known}.")


def choose_name(model: nn.Module, name: str | None, who: str) -> str:
    """The name of an adapter of the model, which may be left out where there is one only.

    Raises:
        LowRankError: if there is no such adapter, or no name and not exactly one adapter.
    """
    names = sorted({own for bank in banks(model) for own in bank.names})
    if name is None and len(names) != 1:
        remedy = "give the name of it" if names else "call add_lora_ first"
        raise LowRankError(f"{who}: the model has the adapters {names}, expected one; {remedy}.")
    name = names[0] if name is None else name
    check_name(model, name)
    return name
