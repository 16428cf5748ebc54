"""``merge_lora_`` and ``unmerge_lora_``: adapters into the weights, and out again to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules import is_quantized
from .adapted_weight import AdaptedWeight, adapted_weights
from .attach import strip_
from .module_copies import copies_of
from .modules_to_save import adopt_whole_

Ties = Literal["refuse", "untie"]
Users = dict[int, list[tuple[str, nn.Module]]]


@torch.no_grad()
def merge_lora_(model: nn.Module, *, ties: Ties = "refuse", safe_merge: bool = True, unload: bool = False) -> nn.Module:
    """Adds the deltas of all adapters in use to their weights, in place: in fp32, rounded once.

    The base weights are kept aside, so that :func:`unmerge_lora_` brings them back to the bit. Until then the model is
    copied and pickled as it is, but its state dict is refused: it would be loaded as if nothing were merged.

    Args:
        model: an adapted model.
        ties: what to do where an adapted weight also belongs to a module that is not adapted: ``"refuse"``, or
            ``"untie"``, which leaves that module the base weight.
        safe_merge: whether to refuse sums with NaN or Inf entries, as a broken adapter gives.
        unload: whether to take the adapters off afterwards and leave a plain model with the merged weights: classes,
            keys and ``requires_grad`` are as before the first adapter, and nothing is kept aside. Adapters that are
            merged already are taken off too.

    Returns:
        The model.

    Raises:
        LowRankError: if they are merged already, a weight is tied, quantized, or a product of factors, a bias of an
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
    weights = adapted_weights(model)
    if not weights and not (unload and copies_of(model)):
        raise LowRankError("merge_lora_: the model has no adapters; call add_lora_ first.")
    separate = [weight for weight in weights if weight.bank.merged is None]
    if len(separate) < len(weights) and not unload:
        raise LowRankError("merge_lora_: the adapters are merged already; call unmerge_lora_ first.")
    users = users_of(model)
    for weight in separate:
        _check(weight, users, ties)
    biases = [(each.module, total) for each in weights if unload and (total := _bias(each, users, ties)) is not None]
    values = [_sum(weight) for weight in separate]
    for weight, value in zip(separate, values, strict=True):
        if safe_merge and not bool(torch.isfinite(value).all()):
            raise LowRankError(
                f"merge_lora_: {weight.name!r} would have NaN or Inf entries; choose another adapter with use_adapter,"
                " or give safe_merge=False."
            )
    for weight, value in zip(separate, values, strict=True):
        _put_in(weight, value, users)
    if not unload:
        return model
    for module, total in biases:
        bias = _own(module, "bias", users)
        bias.data = (bias + total).to(bias.dtype)
    for weight in weights:
        weight.bank.merged = None
    adopt_whole_(model)
    strip_(model)
    return model


@torch.no_grad()
def unmerge_lora_(model: nn.Module) -> nn.Module:
    """Brings the base weights back, to the bit, in place; weights that were untied stay so.

    Args:
        model: the model whose adapters :func:`merge_lora_` has merged.

    Returns:
        The model.

    Raises:
        LowRankError: if nothing is merged.
    """
    found = [weight for weight in adapted_weights(model) if weight.bank.merged is not None]
    if not found:
        raise LowRankError("unmerge_lora_: nothing is merged.")
    _take_out(found)
    return model


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Inside the context what is merged is not; afterwards it is merged again, where it still has adapters."""
    found = {weight: weight.bank for weight in adapted_weights(model) if weight.bank.merged is not None}
    with torch.no_grad():
        _take_out(found)
    try:
        yield
    finally:
        users = users_of(model)
        with torch.no_grad():
            for weight, bank in found.items():
                if weight.is_adapted and weight.bank is bank:
                    _put_in(weight, _sum(weight), users)


def _check(weight: AdaptedWeight, users: Users, ties: Ties) -> None:
    """Raises if the adapters of a weight cannot be merged into it."""
    module, bank, dense, label = weight.module, weight.bank, weight.dense, weight.name
    if dense is None:
        raise LowRankError(
            f"merge_lora_: {label!r} is a {type(module).__name__}, whose weight is a product; call densify_ first,"
            " or keep its adapter."
        )
    if is_quantized(dense):
        raise LowRankError(
            f"merge_lora_: {label!r} is quantized ({type(dense).__name__}), which the sum would have to be again;"
            " keep its adapter, or merge into the full-precision model and quantize that."
        )
    if bank.rows is not None or bank.disabled:
        where = "lora_rows" if bank.rows is not None else "lora_disabled"
        raise LowRankError(f"merge_lora_: called inside {where}, where other adapters count; leave that first.")
    _check_ties(label, _holder(weight), module, users, ties)


def _check_ties(label: str, parameter: nn.Parameter, module: nn.Module, users: Users, ties: Ties) -> None:
    others = [other for other, owner in users[id(parameter)] if owner is not module]
    if others and ties == "refuse":
        raise LowRankError(
            f"merge_lora_: the weight of {label!r} is tied to {', '.join(map(repr, others))}, which merging would"
            " change; give ties='untie' to part them."
        )


def _bias(weight: AdaptedWeight, users: Users, ties: Ties) -> Tensor | None:
    """The sum of the biases of the adapters of a weight, or ``None``."""
    found = [adapter.gate * adapter.bias for adapter in weight.bank if adapter.bias is not None]
    if not found:
        return None
    bias = weight.module._parameters.get("bias")
    if bias is None:
        raise LowRankError(
            f"merge_lora_: an adapter of {weight.name!r} has a bias, and its layer has none to add it to; give the"
            " layer a bias of zeros before add_lora_, or adapt it with bias=False."
        )
    _check_ties(weight.name.removesuffix("weight") + "bias", bias, weight.module, users, ties)
    return torch.stack(found).sum(0)


def _sum(weight: AdaptedWeight) -> Tensor:
    """The weight with its adapters, rounded once."""
    dense = weight.dense
    assert dense is not None
    return weight.bank.effective(dense.to(torch.promote_types(dense.dtype, torch.float32))).to(dense.dtype)


def _put_in(weight: AdaptedWeight, value: Tensor, users: Users) -> None:
    """Writes a merged weight, in place; the base is kept in the bank."""
    bank, holder = weight.bank, _own(weight.module, weight.holder_name, users)
    if weight.is_slice:
        part = weight.slice_of(holder.detach())
        bank.merged = part.clone()
        part.copy_(value)
    else:
        bank.merged, holder.data = holder.data, value


def _take_out(weights: Iterable[AdaptedWeight]) -> None:
    """Writes the base weights back, in place."""
    for weight in weights:
        bank, holder = weight.bank, _holder(weight)
        assert bank.merged is not None
        if weight.is_slice:
            weight.slice_of(holder.detach()).copy_(bank.merged)
        else:
            holder.data = bank.merged
        bank.merged = None


def _own(module: nn.Module, name: str, users: Users) -> nn.Parameter:
    """The parameter of a module, untied from those of others."""
    parameter = module._parameters[name]
    assert parameter is not None
    if len({id(owner) for _, owner in users[id(parameter)]}) > 1:
        parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        module._parameters[name] = parameter
    return parameter


def _holder(weight: AdaptedWeight) -> nn.Parameter:
    holder = weight.holder
    assert holder is not None
    return holder


def users_of(model: nn.Module) -> Users:
    """The names of every parameter in the model with their modules, by the parameter's ``id``."""
    users: Users = defaultdict(list)
    for owner, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append((f"{owner}.{name}" if owner else name, module))
    return users
