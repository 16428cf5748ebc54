"""Which parameters get an adapter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from ..errors import LowRankError
from ..layers import LowRankLinear, is_compressed
from ..modules import module_aliases, walk_layers
from .adapted_weight import AdaptedWeight
from .weight_layout import SLICES, is_conv1d

Target = str | Iterable[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]
_NO_WEIGHTS = ("bias_k", "bias_v")
_HEADS = ("score", "classifier", "qa_outputs")


def targets(
    model: nn.Module, target: Target, exclude: Target | None = None, saved: Iterable[str] = ()
) -> list[AdaptedWeight]:
    """The weights that a target selects, in the order of the model.

    Args:
        model: where to look.
        target: names of modules, or the ends of them, in a list; ``"all-linear"``, which is every linear layer but the
            output head of a transformers model; a regular expression, as a string or compiled, that must match the
            whole name (as in PEFT); or a predicate ``(name, module) -> bool``. A name may end with a parameter
            (``"lstm.weight_hh_l0"``, ``"experts.gate_up_proj"``): then only that one is taken; ``"self_attn.q_proj"``
            is a slice of a fused attention.
        exclude: what to leave out of these, given in the same forms.
        saved: names of modules that are trained whole: nothing in them is taken.

    Raises:
        LowRankError: if nothing matches, or one of the names of a list does not.
    """
    left_out = set() if exclude is None else set(_matching(model, exclude, "exclude="))
    # excluding a fused weight excludes its slices
    left_out |= {part for weight in left_out for part in _slices(weight)}
    whole = tuple(f"{name}." for name in saved)
    found: list[AdaptedWeight] = []
    for weight in _matching(model, target):
        if whole and f"{weight.owner}.".startswith(whole):
            continue
        # excluding a slice of a fused weight leaves the others
        parts = _slices(weight)
        own = parts if any(part in left_out for part in parts) else [weight]
        found += [each for each in own if each not in left_out]
    if not found:
        raise LowRankError(
            f"add_lora_: {target!r} matches no layer that can be adapted"
            + (" and is not left out by exclude= or modules_to_save=." if exclude is not None or whole else ".")
        )
    return found


def _matching(model: nn.Module, target: Target, what: str = "target") -> list[AdaptedWeight]:
    weights = adaptable_weights(model)
    slices = [part for weight in weights for part in _slices(weight)]
    aliases = module_aliases(model)
    if isinstance(target, str) and target.lower() == "all-linear":
        heads = tuple(f"{name}." for name in output_heads(model))
        linear = [weight for weight in weights if _is_linear(weight.module)]
        return [weight for weight in linear if not (heads and f"{weight.owner}.".startswith(heads))]
    if isinstance(target, (str, re.Pattern)):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise LowRankError(
                f"add_lora_: got {target!r}, expected a regular expression that compiles: {error}."
            ) from None
        found = [weight for weight in weights if _matches(pattern, weight, aliases[weight.module])]
        known = {part for weight in found for part in _slices(weight)}  # of fused weights that match as a whole
        others = [part for part in slices if part not in known]
        return found + [part for part in others if any(map(pattern.fullmatch, _full_names(part, aliases[part.module])))]
    if callable(target):
        return [weight for weight in weights if any(target(alias, weight.module) for alias in aliases[weight.module])]
    chosen: set[AdaptedWeight] = set()
    for name in target:
        taken = {weight for weight in weights if _ends(weight, aliases[weight.module], name)}
        taken = taken or {part for part in slices if _ends(part, aliases[part.module], name)}
        if not taken:
            close = difflib.get_close_matches(name, [weight.owner for weight in weights], n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            which = "" if what == "target" else f"{what} has "
            raise LowRankError(f"add_lora_: {which}{name!r} matches no layer that can be adapted.{hint}")
        chosen |= taken
    for weight in chosen if what == "target" else ():
        if any(part in chosen for part in _slices(weight)):
            raise LowRankError(
                f"add_lora_: target has {weight.name!r} and a slice of it; name either the whole or the slices."
            )
    return [weight for weight in (*weights, *slices) if weight in chosen]


def output_heads(model: nn.Module) -> list[str]:
    """The names of a transformers model's output heads, which ``"all-linear"`` leaves out as PEFT does.

    That is the layer that gives the logits of tokens, or else the classifier under one of its usual names.
    """
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return []
    head = get()
    modules = [head] if head is not None else [getattr(model, name, None) for name in _HEADS]
    return [name for name, module in model.named_modules() if name and any(module is each for each in modules)]


def adaptable_weights(model: nn.Module) -> list[AdaptedWeight]:
    """Every matrix, kernel and stack of matrices of a model; a factored layer, or one in int8, counts as one weight."""
    found = []
    for owner, module in walk_layers(model):
        if ".lora_" in f".{owner}." or isinstance(module, torch.jit.ScriptModule):
            continue
        if is_compressed(module):
            found.append(AdaptedWeight(owner, "weight", module))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and key not in _NO_WEIGHTS:
                found.append(AdaptedWeight(owner, key, module))
    return found


def _slices(weight: AdaptedWeight) -> list[AdaptedWeight]:
    """The weights of queries, keys and values in a fused one; none of any other."""
    fused = weight.parameter == "in_proj_weight"
    return [replace(weight, parameter=part) for part in SLICES] if fused else []


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module)


def _matches(pattern: re.Pattern[str], weight: AdaptedWeight, aliases: Iterable[str]) -> bool:
    return any(pattern.fullmatch(alias) or pattern.fullmatch(f"{alias}.{weight.parameter}") for alias in aliases)


def _full_names(weight: AdaptedWeight, aliases: Iterable[str]) -> list[str]:
    return [f"{alias}.{weight.parameter}" if alias else weight.parameter for alias in aliases]


def _ends(weight: AdaptedWeight, aliases: Iterable[str], name: str) -> bool:
    """Whether a name, or the end of one, means a weight: its module's name, or that with the parameter behind."""
    names = list(aliases)
    for alias, full in zip(names, _full_names(weight, names), strict=True):
        if any(own == name or own.endswith(f".{name}") for own in (alias, full, full.removesuffix("_weight"))):
            return True
    return False
