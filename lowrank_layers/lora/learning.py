"""Which parameters of a module learn, remembered while the module is not in use."""

from __future__ import annotations

from torch import nn

_PAUSED = "_lora_paused"


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn while the module is in use, by name."""
    paused = module.__dict__.get(_PAUSED, ())
    return {name: p for name, p in module.named_parameters() if p.requires_grad or name in paused}


def let_learn_(module: nn.Module, on: bool) -> None:
    """Lets the parameters learn, or pauses them: then their gradients are ``None``, and no optimizer moves them."""
    found = learned(module)
    for parameter in found.values():
        parameter.requires_grad_(on)
    module.__dict__[_PAUSED] = () if on else tuple(found)
