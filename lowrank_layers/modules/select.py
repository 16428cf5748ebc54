"""Choosing layers of a model by name, type or predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ..errors import LowRankError
from ..layers import PROJECTIONS
from .tree import module_aliases, walk_layers

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A name, a type, or a predicate ``(name, module) -> bool``."""


def select(
    model: nn.Module, selectors: Iterable[Selector], argument: str, closed: Iterable[tuple[str, nn.Module]] = ()
) -> set[str]:
    """Returns the first names of the modules that any of the selectors takes.

    Args:
        model: the model whose modules are searched.
        selectors: a module's full name, the end of one (``"fc1"``, ``"mlp.fc1"``), the name of a parent (all
            that lies below it), a type, or a predicate ``(name, module) -> bool``.
        argument: name of the caller's argument, for the message.
        closed: the layers of the same model before its attentions were opened; a selector that takes an attention
            takes its projections.

    Raises:
        LowRankError: if a selector matches nothing.
    """
    if isinstance(selectors, (str, type)) or callable(selectors):
        raise LowRankError(f"{argument}: got {selectors!r}, expected a list; write [{selectors!r}].")
    aliases = {name: names for names in module_aliases(model).values() for name in names}
    layers = [*walk_layers(model), *closed]
    attentions = {name for name, module in closed if isinstance(module, nn.MultiheadAttention)}
    taken: set[str] = set()
    for selector in selectors:
        found = {name for name, module in layers if _matches(selector, aliases[name], module)}
        if not found:
            close = difflib.get_close_matches(str(selector), list(aliases), n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            raise LowRankError(f"{argument}: {selector!r} matches no module of the model.{hint}")
        taken |= found
        for name in found & attentions:
            inside = {f"{name}.{projection}" for projection in PROJECTIONS}
            taken |= inside if not inside & found else set()
    return taken


def matches_name(selector: str, name: str) -> bool:
    """Returns whether a selector is a module's name, the end of it, or the name of a parent.

    Args:
        selector: the selector.
        name: the module's name.
    """
    return name == selector or name.endswith(f".{selector}") or name.startswith(f"{selector}.")


def _matches(selector: Selector, names: Sequence[str], module: nn.Module) -> bool:
    if isinstance(selector, str):
        return any(matches_name(selector, name) for name in names)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(names[0], module))
    raise LowRankError(f"got selector {selector!r}, expected a name, a type or a predicate (name, module) -> bool.")
