"""Properties of torch's optimizers: their weight decay, whether a step depends on the weights, their moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import optim

from ..errors import LowRankError

_COUPLED = (optim.SGD, optim.RMSprop, optim.Adadelta, optim.Adamax)
_DECOUPLED = (optim.Adafactor, optim.Muon)
_BY_FLAG = (optim.Adam, optim.NAdam, optim.RAdam)
_UNSUPPORTED = {
    optim.LBFGS: "it calls the closure several times per step",
    optim.SparseAdam: "it needs sparse gradients",
    optim.ASGD: "it averages the parameters",
    optim.Adagrad: "it makes its state when it is constructed",
}
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def check_supported(optimizer: optim.Optimizer) -> None:
    """Raises unless the optimizer steps each parameter by itself, from its dense gradient."""
    for kind, why in _UNSUPPORTED.items():
        if isinstance(optimizer, kind):
            raise LowRankError(
                f"LowRankProjection: got {kind.__name__}, but {why}; use another optimizer, such as AdamW, SGD or"
                " RMSprop."
            )


def decoupled(optimizer: optim.Optimizer, group: Mapping[str, Any], given: bool | None) -> bool:
    """Whether weight decay is decoupled, as in AdamW, rather than added to the gradient, as in SGD.

    Args:
        optimizer: the optimizer.
        group: a parameter group of it.
        given: the user's own answer; ``None`` needs one of torch's optimizers.
    """
    if given is not None or not group.get("weight_decay"):
        return bool(given)
    if isinstance(optimizer, _BY_FLAG):
        return bool(group["decoupled_weight_decay"])
    if isinstance(optimizer, _COUPLED + _DECOUPLED):
        return isinstance(optimizer, _DECOUPLED)
    raise LowRankError(
        f"LowRankProjection: got {type(optimizer).__name__} with weight_decay={group['weight_decay']}, which is none"
        " of torch's; give decoupled=True if it multiplies the weights, as AdamW, False if it adds to the gradient."
    )


def reads_values(optimizer: optim.Optimizer) -> bool:
    """Whether a step may depend on the parameter's value beyond weight decay, as that of Adafactor does.

    If it does not, the small parameter is zero during a step, which saves a product and keeps every digit of the step.
    """
    return not isinstance(optimizer, (*_COUPLED, *_BY_FLAG, optim.Muon, optim.Rprop))
