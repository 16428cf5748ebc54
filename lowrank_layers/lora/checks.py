"""Which weights an adapter cannot be put on, and why."""

from __future__ import annotations

from torch import nn

from ..errors import LowRankError, UnsupportedLayerError
from ..layers import is_compressed, is_derived, is_int8
from ..modules import is_quantized
from .adapted_weight import AdaptedWeight, bank_of
from .trained_whole import TrainedWhole
from .weight_layout import SLICES


def check_adaptable(weight: AdaptedWeight, name: str | None, dora: bool = False) -> None:
    """Raises if an adapter of that name cannot be put on a weight.

    Args:
        weight: where the adapter shall go.
        name: name of the adapter; with ``None`` it is there already, and others may be merged.
        dora: whether the adapter renormalizes the weight's outputs.

    Raises:
        LowRankError: with the weight's name, the reason and the remedy.
    """
    module, label = weight.module, weight.name
    if (is_derived(module) and not is_int8(module)) or hasattr(module, "parametrizations"):
        raise LowRankError(f"add_lora_: {label!r} is parametrized; fold it first.")
    if isinstance(module, TrainedWhole):
        raise LowRankError(
            f"add_lora_: {label!r} is trained whole by another adapter (modules_to_save); leave it out with exclude=."
        )
    if name is not None and weight.is_adapted and weight.bank.merged is not None:
        raise LowRankError(f"add_lora_: the adapters of {label!r} are merged; call unmerge_lora_ first.")
    if weight.is_adapted and name in weight.bank.names:
        raise LowRankError(f"add_lora_: {label!r} has an adapter {name!r} already; give another name.")
    rivals = SLICES if weight.parameter == "in_proj_weight" else ("in_proj_weight",) if weight.is_slice else ()
    if any(bank_of(module, rival) is not None for rival in rivals):
        raise LowRankError(
            f"add_lora_: {label!r} overlaps with a part of it that is adapted; choose the whole or parts."
        )
    plain = getattr(module, "_plain_class", type(module))
    if is_compressed(module) and (dora or weight.is_read_whole):
        raise UnsupportedLayerError(
            f"add_lora_: {label!r} is a {plain.__name__}, whose forward never reads a whole weight"
            f"{' to renormalize' if dora else ''}; call densify_ first."
        )
    _ = weight.layout  # raises for a weight that is no matrix or kernel
    base = weight.base
    if base.is_meta:
        raise LowRankError(
            f"add_lora_: {label!r} is on the meta device: it has no values yet, or accelerate has offloaded them; load"
            " the model first, without offloading (device_map='auto' may offload, a device does not)."
        )
    if not base.is_floating_point():
        raise LowRankError(f"add_lora_: {label!r} is {base.dtype}, expected floating point.")
    if is_quantized(base) and plain.forward is not nn.Linear.forward:
        raise UnsupportedLayerError(
            f"add_lora_: {label!r} is quantized ({type(base).__name__}) and a {plain.__name__}, expected an"
            " nn.Linear; leave it dense, or choose another target."
        )
