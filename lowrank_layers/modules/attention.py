"""Opening ``nn.MultiheadAttention`` into its four projections, so that each can be planned and replaced on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..layers import LowRankMultiheadAttention
from .reasons import reason_to_keep
from .shortcuts import update_shortcuts_
from .tree import module_aliases, walk_layers


def openable_attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Returns every ``nn.MultiheadAttention`` below the model that can be opened, by its first name.

    Subclasses cannot, nor can one with a computed weight, a hook or a forward of its own, nor one that shares a
    parameter with another module.
    """
    users: dict[int, set[str]] = defaultdict(set)
    aliases = module_aliases(model)
    for module, names in aliases.items():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].update(names)
    found = {}
    for module, names in aliases.items():
        if names[0] == "" or type(module) is not nn.MultiheadAttention:
            continue
        own = {inside for name in names for inside in (name, f"{name}.out_proj")}
        shared = any(not users[id(parameter)] <= own for parameter in module.parameters())
        if not shared and all(reason_to_keep(part) is None for part in module.modules()):
            found[names[0]] = module
    return found


def open_attentions(model: nn.Module) -> dict[str, LowRankMultiheadAttention]:
    """Returns the attentions of a model that stand open, by their first name."""
    return {name: module for name, module in walk_layers(model) if isinstance(module, LowRankMultiheadAttention)}


@contextmanager
def opened_attentions(model: nn.Module, only: Collection[str] | None = None) -> Iterator[None]:
    """Replaces attentions by four ``nn.Linear`` views of their weights inside, and puts them back afterwards.

    Args:
        model: changed in place, and back.
        only: names of the attentions to open; by default all that can be.
    """
    closed = {name: module for name, module in openable_attentions(model).items() if only is None or name in only}
    put_(model, {name: LowRankMultiheadAttention.over(module) for name, module in closed.items()})
    update_shortcuts_(model)
    try:
        yield
    finally:
        put_(model, closed)
        update_shortcuts_(model)


def put_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Puts modules in the place of those of the given names, under all the names that those have, and does no more.

    Callers outside of this package want :func:`replace_`.
    """
    if not replacements:
        return
    aliases = module_aliases(model)
    # resolve every place first: an alias may lie below another replaced name
    places = [
        (model.get_submodule(alias.rpartition(".")[0]), alias.rpartition(".")[2], new)
        for name, new in replacements.items()
        for alias in aliases[model.get_submodule(name)]
    ]
    for parent, attribute, new in places:
        parent._modules[attribute] = new
