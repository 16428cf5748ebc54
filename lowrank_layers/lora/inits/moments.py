"""What EVA and CorDA take from the statistics of a model: the second moments of the layers' inputs."""

from __future__ import annotations

from torch import Tensor

from ...calibrate.statistics import Statistics
from ...errors import LowRankError
from .base import InitContext


def check_statistics(stats: object, init: str) -> None:
    """Raises unless these are statistics of a model."""
    if not isinstance(stats, Statistics):
        raise LowRankError(f"{init}: got stats of type {type(stats).__name__}, expected calibrate(model, batches).")


def input_moment(stats: Statistics, context: InitContext) -> Tensor | None:
    """``E[x x^T]`` of the inputs of a weight's layer, or ``None`` where it was not taken as a matrix."""
    owner = context.weight.owner
    moment = stats[owner].inputs.second if owner in stats else None
    return moment if moment is not None and moment.ndim == 2 else None


def check_moment(stats: Statistics, context: InitContext, init: str) -> Tensor:
    """:func:`input_moment`, which has to be there.

    Raises:
        LowRankError: if it is not.
    """
    moment = input_moment(stats, context)
    if moment is None:
        raise LowRankError(
            f"add_lora_: init {init} needs the second moment of the inputs of {context.weight.name!r}, and the"
            " statistics have none; give calibrate(model, batches) of this model, and choose another init for"
            " embeddings and grouped convolutions."
        )
    return moment
