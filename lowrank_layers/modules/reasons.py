"""Reasons for which a layer has to stay as it is, in the words that a plan shows."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from ..layers import is_derived, is_int8, peculiarity
from .tree import walk_layers

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on the module itself."""
    return any(getattr(module, kind) for kind in _HOOKS)


def reason_to_keep(module: nn.Module) -> str | None:
    """Returns why replacing this module would lose something; ``None`` if it would not."""
    if is_int8(module):
        return "its weight is stored in int8; make the model dense first (densify_)"
    if is_derived(module):
        return "its weight is computed (parametrized or normed); fold it to factorize it"
    strange = peculiarity(module)
    if strange is not None:
        return strange
    if has_hooks(module):
        return "it carries hooks, which a replacement would drop"
    for key, parameter in module.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {key} carries a gradient hook, which a replacement would drop"
    return None


def reasons_to_keep(model: nn.Module) -> dict[str, str]:
    """Returns the layers of a model that must not be replaced, by their first name, with the reason.

    Beside the reasons of :func:`reason_to_keep` these are tied parameters, adapters, and attentions that cannot be
    opened; open the others first (:func:`opened_attentions`).
    """
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
        for name in names if len(names) > 1 else ():
            others = ", ".join(repr(other) for other in names if other != name)
            reasons[name] = f"its parameters are tied to {others}"
    return reasons
