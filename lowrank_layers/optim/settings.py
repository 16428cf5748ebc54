"""The arguments of LowRankProjection, validated before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_integer, is_number
from ..errors import LowRankError
from .torch_optimizers import check_supported

_CHOICES = {"method": ("svd", "random", "power"), "rotate": ("none", "first", "both"), "decoupled": (None, True, False)}
_LEAST = {"refresh": 1, "min_size": 0, "seed": 0}


def check_optimizer(optimizer: object) -> None:
    """Raises unless this is a supported optimizer without state and scheduler."""
    if not isinstance(optimizer, Optimizer):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        hint = (
            "; call it with the parameters first." if isinstance(optimizer, type) else "; give one around parameters."
        )
        raise LowRankError(f"LowRankProjection: got {kind.__name__}, expected a torch.optim.Optimizer{hint}")
    check_supported(optimizer)
    if optimizer.state:
        raise LowRankError(
            f"LowRankProjection: got a {type(optimizer).__name__} that has a state already, of unprojected gradients;"
            " give a new one."
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise LowRankError(
            "LowRankProjection: got an optimizer that has a scheduler; make the scheduler for the projection instead."
        )


def check_settings(**settings: Any) -> None:
    """Validates the settings that are numbers or strings.

    Args:
        **settings: ``refresh``, ``method``, ``scale``, ``min_size``, ``rotate``, ``seed`` and ``decoupled``.
    """
    for name, least in _LEAST.items():
        check_integer(settings[name], "LowRankProjection", name, least)
    for name, choices in _CHOICES.items():
        value = settings[name]
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise LowRankError(
                f"LowRankProjection: got {name}={value!r}, expected one of {', '.join(map(str, choices))}."
            )
    scale = settings["scale"]
    if not is_number(scale) or not 0 < scale < math.inf:
        raise LowRankError(f"LowRankProjection: got scale={scale!r}, expected a positive number.")


def target_filter(target: Iterable[Tensor] | Callable[[Tensor], bool] | None) -> Callable[[Tensor], bool]:
    """A function that says whether a parameter is projected, from the argument ``target``."""
    if target is None:
        return lambda p: True
    if callable(target):
        return target
    chosen = list(target) if isinstance(target, Iterable) and not isinstance(target, (str, Tensor)) else [target]
    if isinstance(target, Tensor) or not all(isinstance(p, Tensor) for p in chosen):
        raise LowRankError(
            f"LowRankProjection: got a target of type {type(target).__name__} with other things than parameters,"
            " expected parameters in a list, or a function of a parameter; for names collect them:"
            " [p for name, p in model.named_parameters() if ...]."
        )
    ids = {id(p) for p in chosen}
    return lambda p: id(p) in ids
