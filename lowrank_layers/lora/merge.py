"""Adapters into the weights, and out again, to the bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..walk import is_quantized
from .adapted import banks_of
from .adapter import Bank
from .kinds import SLICES, stored

Ties = Literal["refuse", "untie"]


@torch.no_grad()
def merge_lora_(model: nn.Module, *, ties: Ties = "refuse", safe_merge: bool = True) -> nn.Module:
    """Adds what the adapters that are in use give to their weights, in fp32 with one rounding, in place.

    The base weights are kept aside, so that :func:`unmerge_lora_` brings them back to the bit;
    ``remove_lora_(model, keep="merged")`` lets go of them.

    Args:
        model: an adapted model.
        ties: what to do where an adapted weight also belongs to a module that is not adapted: ``"refuse"``, or
            ``"untie"``, which leaves that module the base weight.
        safe_merge: refuses a sum with NaN or Inf entries, as a broken adapter gives; ``False`` does not look.

    Returns:
        The model.

    Raises:
        LowRankError: if they are merged already, a weight is tied, quantised, or a product of factors, or the sum is
            not finite; nothing changes then.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2, init="pissa")
        >>> base = model[0]._parameters["weight"].clone()
        >>> _ = lr.unmerge_lora_(lr.merge_lora_(model))
        >>> torch.equal(model[0]._parameters["weight"], base)
        True
    """
    if ties not in ("refuse", "untie"):
        raise LowRankError(f"merge_lora_: got ties={ties!r}, expected 'refuse' or 'untie'.")
    places = list(_places(model))
    if not places:
        raise LowRankError("merge_lora_: the model has no adapters; call add_lora_ first.")
    users = users_of(model)
    merged: list[Tensor] = []
    for module, name, bank, label in places:
        if bank.merged is not None:
            raise LowRankError("merge_lora_: the adapters are merged already; call unmerge_lora_ first.")
        weight = stored(module, name)
        if weight is None:
            raise LowRankError(
                f"merge_lora_: {label!r} is a {type(module).__name__}, whose weight is a product; call densify_ first,"
                " or keep its adapter."
            )
        if is_quantized(weight):
            raise LowRankError(
                f"merge_lora_: {label!r} is quantised ({type(weight).__name__}), which the sum would have to be again;"
                " keep its adapter, or merge into the full-precision model and quantise that."
            )
        others = [other for other, owner in users[id(_parameter(module, name))] if owner is not module]
        if others and ties == "refuse":
            raise LowRankError(
                f"merge_lora_: the weight of {label!r} is tied to {', '.join(map(repr, others))}, which merging would"
                " change; give ties='untie' to part them."
            )
        merged.append(bank.effective(weight.float()).to(weight.dtype))
        if safe_merge and not bool(torch.isfinite(merged[-1]).all()):
            raise LowRankError(
                f"merge_lora_: {label!r} would have NaN or Inf entries; choose another adapter with use_adapter, or"
                " give safe_merge=False."
            )
    for (module, name, bank, _), value in zip(places, merged, strict=True):
        weight = _parameter(module, name)
        if len({id(owner) for _, owner in users[id(weight)]}) > 1:
            weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            module._parameters["in_proj_weight" if name in SLICES else name] = weight
        if name in SLICES:
            part = weight.detach().chunk(3)[SLICES.index(name)]
            bank.merged = part.clone()
            part.copy_(value)
        else:
            bank.merged, weight.data = weight.data, value
    return model


@torch.no_grad()
def unmerge_lora_(model: nn.Module) -> nn.Module:
    """Brings the base weights back, to the bit, in place; weights that were untied stay so.

    Raises:
        LowRankError: if nothing is merged.
    """
    found = [(module, name, bank) for module, name, bank, _ in _places(model) if bank.merged is not None]
    if not found:
        raise LowRankError("unmerge_lora_: nothing is merged.")
    for module, name, bank in found:
        weight = _parameter(module, name)
        assert bank.merged is not None
        if name in SLICES:
            weight.detach().chunk(3)[SLICES.index(name)].copy_(bank.merged)
        else:
            weight.data = bank.merged
        bank.merged = None
    return model


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds an adapted weight, or the part of it."""
    parameter = module._parameters["in_proj_weight" if name in SLICES else name]
    assert parameter is not None
    return parameter


def _places(model: nn.Module) -> list[tuple[nn.Module, str, Bank, str]]:
    return [
        (module, name, bank, f"{owner}.{name}" if owner else name)
        for owner, module in model.named_modules()
        for name, bank in banks_of(module).items()
    ]


def users_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules of every parameter, with its name there."""
    users: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for owner, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append((f"{owner}.{name}" if owner else name, module))
    return users
