"""Which parameters get an adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..errors import LowRankError
from ..layers import LowRankLinear, is_factored
from ..modules.tree import module_aliases, walk_layers
from .weight_layout import SLICES, is_conv1d

Target = str | Iterable[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]
Place = tuple[str, str]
"""The name of a module, and of a parameter of it."""
_NO_WEIGHTS = ("bias_k", "bias_v")
_HEADS = ("score", "classifier", "qa_outputs")


def targets(model: nn.Module, target: Target, exclude: Target | None = None, saved: Iterable[str] = ()) -> list[Place]:
    """All that a target means, in the order of the model.

    Args:
        model: where to look.
        target: names of modules, or the ends of them, in a list; ``"all-linear"``, which is every linear layer but the
            output head of a transformers model; a regular expression, as a string or compiled, that must match the
            whole name (as in PEFT); or a predicate ``(name, module) -> bool``. A name may end with a parameter
            (``"lstm.weight_hh_l0"``, ``"experts.gate_up_proj"``): then only that one is taken; ``"self_attn.q_proj"``
            is a part of a fused attention.
        exclude: what to leave out of these, said in the same ways.
        saved: names of modules that are trained whole: nothing in them is taken.

    Raises:
        LowRankError: if nothing matches, or one of the names of a list does not.
    """
    left_out = set() if exclude is None else set(_matching(model, exclude, "exclude="))
    # excluding a fused weight excludes its parts
    left_out |= {(owner, part) for owner, name in left_out if name == "in_proj_weight" for part in SLICES}
    whole = tuple(f"{name}." for name in saved)
    found: list[Place] = []
    for owner, name in _matching(model, target):
        # excluding a part of a fused weight leaves the others
        split = name == "in_proj_weight" and any((owner, part) in left_out for part in SLICES)
        if not (whole and f"{owner}.".startswith(whole)):
            own = [(owner, part) for part in SLICES] if split else [(owner, name)]
            found += [place for place in own if place not in left_out]
    if not found:
        raise LowRankError(
            f"add_lora_: {target!r} matches no layer that can be adapted"
            + (" and is not left out by exclude= or modules_to_save=." if exclude is not None or whole else ".")
        )
    return found


def _matching(model: nn.Module, target: Target, what: str = "target") -> list[Place]:
    places = adaptable(model)
    parts = [(owner, part) for owner, name in places if name == "in_proj_weight" for part in SLICES]
    names = {names[0]: names for names in module_aliases(model).values()}
    if isinstance(target, str) and target.lower() == "all-linear":
        heads = tuple(f"{name}." for name in output_heads(model))
        linear = [place for place, module in places.items() if _is_linear(module)]
        return [place for place in linear if not (heads and f"{place[0]}.".startswith(heads))]
    if isinstance(target, (str, re.Pattern)):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise LowRankError(f"add_lora_: got the regular expression {target!r}, which is none: {error}") from None
        found = [place for place in places if any(_matches(pattern, alias, place[1]) for alias in names[place[0]])]
        return found + [p for p in parts if any(pattern.fullmatch(f"{alias}.{p[1]}") for alias in names[p[0]])]
    if callable(target):
        return [place for place, module in places.items() if any(target(alias, module) for alias in names[place[0]])]
    chosen: set[Place] = set()
    for name in target:
        taken = {p for p in places if _ends(names, p, name)} or {p for p in parts if _ends(names, p, name)}
        if not taken:
            close = difflib.get_close_matches(name, [place[0] for place in places], n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            which = "" if what == "target" else f"{what} has "
            raise LowRankError(f"add_lora_: {which}{name!r} matches no layer that can be adapted.{hint}")
        chosen |= taken
    return [place for place in (*places, *parts) if place in chosen]


def output_heads(model: nn.Module) -> list[str]:
    """The output heads of a transformers model, which ``"all-linear"`` leaves out, as PEFT does.

    That is the layer that gives the logits of tokens, and otherwise the classifier by the name it usually has.
    """
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return []
    head = get()
    modules = [head] if head is not None else [getattr(model, name, None) for name in _HEADS]
    return [name for name, module in model.named_modules() if name and any(module is each for each in modules)]


def adaptable(model: nn.Module) -> dict[Place, nn.Module]:
    """Every matrix, kernel and stack of matrices; a factored layer counts as one weight."""
    found: dict[Place, nn.Module] = {}
    for name, module in walk_layers(model):
        if ".lora_" in f".{name}." or isinstance(module, torch.jit.ScriptModule):
            continue
        if is_factored(module):
            found[name, "weight"] = module
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and key not in _NO_WEIGHTS:
                found[name, key] = module
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module)


def _matches(pattern: re.Pattern[str], owner: str, parameter: str) -> bool:
    return bool(pattern.fullmatch(owner) or pattern.fullmatch(f"{owner}.{parameter}"))


def _ends(names: Mapping[str, list[str]], place: Place, name: str) -> bool:
    """A module's name, or the end of it, takes every weight of the module; with the parameter, that one."""
    for alias in names[place[0]]:
        full = f"{alias}.{place[1]}" if alias else place[1]
        if any(own == name or own.endswith(f".{name}") for own in (alias, full, full.removesuffix("_weight"))):
            return True
    return False
