"""What has to be known of an optimizer to show it a smaller parameter: its weight decay, what it reads, its moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import optim

from ..errors import LowRankError

_COUPLED = (optim.SGD, optim.RMSprop, optim.Adadelta, optim.Adamax)
_DECOUPLED = (optim.Adafactor, optim.Muon)
_FLAGGED = (optim.Adam, optim.NAdam, optim.RAdam)
_UNFIT = {
    optim.LBFGS: "it calls the closure itself, and again",
    optim.SparseAdam: "it wants sparse gradients",
    optim.ASGD: "it averages the parameters",
    optim.Adagrad: "it makes its state with the parameters",
}
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def check_fit(optimizer: optim.Optimizer) -> None:
    """Refuses what does not step parameter by parameter, from dense gradients."""
    for kind, why in _UNFIT.items():
        if isinstance(optimizer, kind):
            raise LowRankError(
                f"LowRankProjection: got {kind.__name__}, but {why}; use another optimizer, such as AdamW, SGD or"
                " RMSprop."
            )


def decoupled(optimizer: optim.Optimizer, group: Mapping[str, Any], told: bool | None) -> bool:
    """Whether weight decay shrinks the weights beside the step (AdamW) rather than adding to the gradient (SGD)."""
    if told is not None or not group.get("weight_decay"):
        return bool(told)
    if isinstance(optimizer, _FLAGGED):
        return bool(group["decoupled_weight_decay"])
    if isinstance(optimizer, _COUPLED + _DECOUPLED):
        return isinstance(optimizer, _DECOUPLED)
    raise LowRankError(
        f"LowRankProjection: got {type(optimizer).__name__} with weight_decay={group['weight_decay']}, which is not"
        " torch's own; say decoupled=True if it shrinks the weights beside the step, False if it adds to the gradient."
    )


def reads_values(optimizer: optim.Optimizer) -> bool:
    """Whether the step may depend on the parameter's value beyond weight decay: Adafactor's does, a foreign one's may.

    The others are shown zeros, which saves a product and keeps every digit of the step.
    """
    return not isinstance(optimizer, (*_COUPLED, *_FLAGGED, optim.Muon, optim.Rprop))
