"""Adapters into the weights, and out again, to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules.tree import is_quantized
from .adapted import bank_of, banks_of
from .adapter import Bank
from .inject import strip_
from .weight_layout import SLICES, stored
from .whole import adopt_whole_, copies_of

Ties = Literal["refuse", "untie"]
Users = dict[int, list[tuple[str, nn.Module]]]


class _Place(NamedTuple):
    """An adapted weight: its module, its name there, its adapters, and its name in the model."""

    module: nn.Module
    name: str
    bank: Bank
    label: str


@torch.no_grad()
def merge_lora_(model: nn.Module, *, ties: Ties = "refuse", safe_merge: bool = True, unload: bool = False) -> nn.Module:
    """Adds what the adapters that are in use give to their weights, in fp32 with one rounding, in place.

    The base weights are kept aside, so that :func:`unmerge_lora_` brings them back to the bit. Until then the model is
    copied and pickled as it is, but its state dict is refused: it would be loaded as if nothing were merged.

    Args:
        model: an adapted model.
        ties: what to do where an adapted weight also belongs to a module that is not adapted: ``"refuse"``, or
            ``"untie"``, which leaves that module the base weight.
        safe_merge: refuses a sum with NaN or Inf entries, as a broken adapter gives; ``False`` does not look.
        unload: whether to take the adapters off afterwards, with their merged weights left in the plain model: classes,
            keys and ``requires_grad`` are as before the first adapter, and nothing is kept aside. Adapters that are
            merged already are taken off likewise.

    Returns:
        The model.

    Raises:
        LowRankError: if they are merged already, a weight is tied, quantised, or a product of factors, a bias of an
            adapter has none to be added to, or a sum is not finite; nothing changes then.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2, init="pissa")
        >>> base = model[0]._parameters["weight"].clone()
        >>> _ = lr.unmerge_lora_(lr.merge_lora_(model))
        >>> torch.equal(model[0]._parameters["weight"], base)
        True
        >>> type(lr.merge_lora_(model, unload=True)[0]), list(model.state_dict())
        (<class 'torch.nn.modules.linear.Linear'>, ['0.weight', '0.bias'])
    """
    if ties not in ("refuse", "untie"):
        raise LowRankError(f"merge_lora_: got ties={ties!r}, expected 'refuse' or 'untie'.")
    places = list(_places(model))
    if not places and not (unload and copies_of(model)):
        raise LowRankError("merge_lora_: the model has no adapters; call add_lora_ first.")
    separate = [place for place in places if place.bank.merged is None]
    if len(separate) < len(places) and not unload:
        raise LowRankError("merge_lora_: the adapters are merged already; call unmerge_lora_ first.")
    users = users_of(model)
    for place in separate:
        _check(place, users, ties)
    biases = [(each.module, total) for each in places if unload and (total := _bias(each, users, ties)) is not None]
    values = [_sum(place) for place in separate]
    for place, value in zip(separate, values, strict=True):
        if safe_merge and not bool(torch.isfinite(value).all()):
            raise LowRankError(
                f"merge_lora_: {place.label!r} would have NaN or Inf entries; choose another adapter with use_adapter,"
                " or give safe_merge=False."
            )
    for place, value in zip(separate, values, strict=True):
        _put_in(place, value, users)
    if not unload:
        return model
    for module, total in biases:
        bias = _own(module, "bias", users)
        bias.data = (bias + total).to(bias.dtype)
    for place in places:
        place.bank.merged = None
    adopt_whole_(model)
    strip_(model)
    return model


@torch.no_grad()
def unmerge_lora_(model: nn.Module) -> nn.Module:
    """Brings the base weights back, to the bit, in place; weights that were untied stay so.

    Returns:
        The model.

    Raises:
        LowRankError: if nothing is merged.
    """
    found = [place for place in _places(model) if place.bank.merged is not None]
    if not found:
        raise LowRankError("unmerge_lora_: nothing is merged.")
    _take_out(found)
    return model


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Inside, what is merged is not; afterwards it is again."""
    found = [place for place in _places(model) if place.bank.merged is not None]
    with torch.no_grad():
        _take_out(found)
    try:
        yield
    finally:
        users = users_of(model)
        with torch.no_grad():
            for place in found:
                if bank_of(place.module, place.name) is place.bank:
                    _put_in(place, _sum(place), users)


def _check(place: _Place, users: Users, ties: Ties) -> None:
    module, name, bank, label = place
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
    if bank.rows is not None or bank.disabled:
        where = "lora_rows" if bank.rows is not None else "lora_disabled"
        raise LowRankError(f"merge_lora_: called inside {where}, where other adapters count; leave that first.")
    _check_ties(label, _parameter(module, name), module, users, ties)


def _check_ties(label: str, parameter: nn.Parameter, module: nn.Module, users: Users, ties: Ties) -> None:
    others = [other for other, owner in users[id(parameter)] if owner is not module]
    if others and ties == "refuse":
        raise LowRankError(
            f"merge_lora_: the weight of {label!r} is tied to {', '.join(map(repr, others))}, which merging would"
            " change; give ties='untie' to part them."
        )


def _bias(place: _Place, users: Users, ties: Ties) -> Tensor | None:
    """What the adapters add to the output beside their product, or ``None``."""
    found = [adapter.gate * adapter.bias for adapter in place.bank if adapter.bias is not None]
    if not found:
        return None
    bias = place.module._parameters.get("bias")
    if bias is None:
        raise LowRankError(
            f"merge_lora_: an adapter of {place.label!r} has a bias, and its layer has none to add it to; give the"
            " layer a bias of zeros before add_lora_, or adapt it with bias=False."
        )
    _check_ties(place.label.removesuffix("weight") + "bias", bias, place.module, users, ties)
    return torch.stack(found).sum(0)


def _sum(place: _Place) -> Tensor:
    """The weight with its adapters, rounded once."""
    weight = stored(place.module, place.name)
    assert weight is not None
    return place.bank.effective(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype)


def _put_in(place: _Place, value: Tensor, users: Users) -> None:
    module, name, bank, _ = place
    weight = _own(module, "in_proj_weight" if name in SLICES else name, users)
    if name in SLICES:
        part = weight.detach().chunk(3)[SLICES.index(name)]
        bank.merged = part.clone()
        part.copy_(value)
    else:
        bank.merged, weight.data = weight.data, value


def _take_out(places: Sequence[_Place]) -> None:
    for module, name, bank, _ in places:
        weight = _parameter(module, name)
        assert bank.merged is not None
        if name in SLICES:
            weight.detach().chunk(3)[SLICES.index(name)].copy_(bank.merged)
        else:
            weight.data = bank.merged
        bank.merged = None


def _own(module: nn.Module, name: str, users: Users) -> nn.Parameter:
    """The parameter of a module, untied from those of others."""
    parameter = module._parameters[name]
    assert parameter is not None
    if len({id(owner) for _, owner in users[id(parameter)]}) > 1:
        parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        module._parameters[name] = parameter
    return parameter


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that holds an adapted weight, or the part of it."""
    parameter = module._parameters["in_proj_weight" if name in SLICES else name]
    assert parameter is not None
    return parameter


def _places(model: nn.Module) -> list[_Place]:
    return [
        _Place(module, name, bank, f"{owner}.{name}" if owner else name)
        for owner, module in model.named_modules()
        for name, bank in banks_of(module).items()
    ]


def users_of(model: nn.Module) -> Users:
    """The modules of every parameter, with its name there."""
    users: Users = defaultdict(list)
    for owner, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append((f"{owner}.{name}" if owner else name, module))
    return users
