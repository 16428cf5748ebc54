"""Finding layers, replacing them everywhere they are used, and keeping the optimizer in step."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..layers import PROJECTIONS
from .attention import mind_fast_paths_
from .tree import module_aliases, put_, reason_to_keep, walk_layers

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def select(
    model: nn.Module, selectors: Iterable[Selector], what: str, closed: Iterable[tuple[str, nn.Module]] = ()
) -> set[str]:
    """The first names of the modules that any selector takes.

    Args:
        model: where to look.
        selectors: a module's full name, the end of one (``"fc1"``, ``"mlp.fc1"``), the name of a parent (all
            that lies below it), a type, or a predicate ``(name, module) -> bool``.
        what: the argument's name, for the message.
        closed: the layers of the same model before its attentions were opened: who takes one takes its projections.

    Raises:
        LowRankError: if a selector matches nothing.
    """
    if isinstance(selectors, (str, type)) or callable(selectors):
        raise LowRankError(f"{what}: got {selectors!r}, expected a list; write [{selectors!r}].")
    aliases = {name: names for names in module_aliases(model).values() for name in names}
    layers = [*walk_layers(model), *closed]
    attentions = {name for name, module in closed if isinstance(module, nn.MultiheadAttention)}
    taken: set[str] = set()
    for selector in selectors:
        found = {name for name, module in layers if _matches(selector, name, module, aliases)}
        if not found:
            close = difflib.get_close_matches(str(selector), list(aliases), n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            raise LowRankError(f"{what}: {selector!r} matches no module of the model.{hint}")
        taken |= found
        for name in found & attentions:
            inside = {f"{name}.{projection}" for projection in PROJECTIONS}
            taken |= inside if not inside & found else set()
    return taken


def _matches(selector: Selector, name: str, module: nn.Module, aliases: Mapping[str, list[str]]) -> bool:
    if isinstance(selector, str):
        return any(
            alias == selector or alias.endswith(f".{selector}") or alias.startswith(f"{selector}.")
            for alias in aliases[name]
        )
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector):
        return bool(selector(name, module))
    raise LowRankError(f"got selector {selector!r}, expected a name, a type or a predicate (name, module) -> bool.")


def reasons_to_stay(model: nn.Module) -> dict[str, str]:
    """Layers that must not be replaced blindly, and why, by their first name."""
    reasons: dict[str, str] = {}
    users: dict[Tensor, list[str]] = defaultdict(list)
    for name, module in walk_layers(model):
        for parameter in module.parameters(recurse=False):
            users[parameter].append(name)
        if isinstance(module, nn.MultiheadAttention):  # one that could not be opened
            prefix = f"{name}." if name else ""
            reasons[f"{prefix}out_proj"] = "nn.MultiheadAttention reads out_proj.weight itself"
            if name and type(module) is nn.MultiheadAttention:
                reasons[name] = "a weight of it is tied, computed or hooked, so that it cannot be opened"
        reason = reason_to_keep(module)
        if ".lora_" in f".{name}." and module._parameters:
            reason = "it belongs to an adapter"
        if reason is not None:
            reasons[name] = reason
    for names in users.values():
        if len(names) > 1:
            for name in names:
                others = ", ".join(repr(other) for other in names if other != name)
                reasons[name] = f"its parameters are tied to {others}"
    return reasons


def replace_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Puts every new module in the place of the old one, under all the names that it has.

    Args:
        model: changed in place.
        replacements: name of the old module to new module.

    Raises:
        LowRankError: if a name is unknown or the model itself; nothing is changed then.
    """
    aliases = {name: names for names in module_aliases(model).values() for name in names}
    for name in replacements:
        if name == "":
            raise LowRankError(
                f"the model itself is the {type(model).__name__} to replace, which cannot be done in place;"
                " wrap it in nn.Sequential, or use from_dense."
            )
        if name not in aliases:
            raise LowRankError(f"the model has no module {name!r}.")
    put_(model, replacements)
    mind_fast_paths_(model)


def remap_optimizer_(optimizer: torch.optim.Optimizer, replaced: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Puts the new modules' parameters where the old ones' were, group by group.

    A bias of the same shape keeps its state (momentum...); the factors start without.

    Args:
        optimizer: changed in place.
        replaced: pairs of old and new module.
    """
    for old, new in replaced:
        before = {id(p): key for key, p in old.named_parameters()}
        homes: dict[bool, dict[str, Any]] = {}  # the groups of the old weights and of the old biases
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in before:
                    homes.setdefault(_is_bias(before[id(p)]), group)
        for group in homes.values():
            group["params"] = [p for p in group["params"] if id(p) not in before]
        had_bias = any(map(_is_bias, before.values()))
        for key, p in new.named_parameters():
            home = homes.get(_is_bias(key) and had_bias)
            if home is not None:
                home["params"].append(p)
        bias = getattr(new, "last", new)._parameters.get("bias")
        for p in old.parameters():
            state = optimizer.state.pop(p, None)
            if state and bias is not None and before[id(p)] == "bias" and p.shape == bias.shape:
                optimizer.state[bias] = state


def _is_bias(key: str) -> bool:
    return key.endswith("bias")
