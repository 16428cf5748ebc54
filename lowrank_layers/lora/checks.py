"""What an adapter cannot be put on."""

from __future__ import annotations

from torch import nn

from ..errors import LowRankError, UnsupportedLayerError
from ..layers import FactoredModule, is_derived
from ..modules.tree import is_quantized
from .adapted import bank_of, base_weight
from .forward import fast_call
from .target import Place
from .weight_layout import SLICES, Kind, kind_of
from .whole import TrainedWhole


def check_place(module: nn.Module, place: Place, name: str | None, dora: bool = False) -> Kind:
    """The layout of a weight that an adapter of that name can be put on.

    Raises:
        LowRankError: where it cannot, saying why.
    """
    label = ".".join(filter(None, place))
    if is_derived(module) or hasattr(module, "parametrizations"):
        raise LowRankError(f"add_lora_: {label!r} is parametrized; fold it first.")
    if isinstance(module, TrainedWhole):
        raise LowRankError(
            f"add_lora_: {label!r} is trained whole by another adapter (modules_to_save); leave it out with exclude=."
        )
    bank = bank_of(module, place[1])
    if bank is not None and bank.merged is not None:
        raise LowRankError(f"add_lora_: the adapters of {label!r} are merged; call unmerge_lora_ first.")
    if bank is not None and name in bank.names:
        raise LowRankError(f"add_lora_: {label!r} has an adapter {name!r} already; give another name.")
    rivals = SLICES if place[1] == "in_proj_weight" else ("in_proj_weight",) if place[1] in SLICES else ()
    if any(bank_of(module, rival) is not None for rival in rivals):
        raise LowRankError(
            f"add_lora_: {label!r} overlaps with a part of it that is adapted; choose the whole or parts."
        )
    plain = getattr(module, "_plain_class", type(module))
    if isinstance(module, FactoredModule) and (dora or fast_call(module) is None):
        raise UnsupportedLayerError(
            f"add_lora_: {label!r} is a {type(module).__name__}, whose forward never reads a whole weight"
            f"{' to renormalise' if dora else ''}; call densify_ first."
        )
    kind = kind_of(module, place[1])
    weight = base_weight(module, place[1])
    if weight.is_meta:
        raise LowRankError(
            f"add_lora_: {label!r} is on the meta device: it has no values yet, or accelerate has offloaded them; load"
            " the model first, without offloading (device_map='auto' may offload, a device does not)."
        )
    if not weight.is_floating_point():
        raise LowRankError(f"add_lora_: {label!r} is {weight.dtype}, expected floating point.")
    if is_quantized(weight) and plain.forward is not nn.Linear.forward:
        raise UnsupportedLayerError(
            f"add_lora_: {label!r} is quantised ({type(weight).__name__}) and a {plain.__name__}, expected an"
            " nn.Linear; leave it dense, or choose another target."
        )
    return kind
