"""A short example on which a model is run to see how its layers hang together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import quiet_eval
from ..calibrate.example import has_tokens, map_tensors
from ..calibrate.prefix_memo import PrefixMemo
from ..calibrate.staged_calibration import without_cache
from ..calibrate.statistics import Statistics
from ..errors import LowRankError

POSITIONS = 16
"""So many tokens are enough."""


@torch.no_grad()
def short_example(model: nn.Module, stats: Statistics, method: str) -> Any:
    """Returns the first positions of the example of statistics, where the model runs on them; else all of it.

    Args:
        model: the model.
        stats: its statistics.
        method: the name of the class that wants it.

    Raises:
        LowRankError: if they have no example.
    """
    if stats.example is None:
        raise LowRankError(
            f"got statistics without an example, on which {method} runs the model to see how its layers hang together;"
            " expected those of calibrate, whose batches hold tensors alone."
        )
    parameter = next(model.parameters())
    batch = map_tensors(lambda tensor: tensor.to(parameter.device), stats.example)
    shapes: set[tuple[int, ...]] = set()

    def look(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    map_tensors(look, batch)
    shape = next(iter(shapes), ())
    if (
        len(shapes) != 1
        or len(shape) != 2
        or shape[1] <= POSITIONS
        or not has_tokens(batch, with_target=stats.with_target)
    ):
        return batch
    few = map_tensors(lambda tensor: tensor[:, :POSITIONS], batch)
    try:
        memo = PrefixMemo(model, with_target=stats.with_target, mask=None)
        with quiet_eval(model), without_cache(model), memo:
            memo.add(few)  # lets go of parameters in files, stage by stage
    except Exception:  # a model of sequences of one length
        return batch
    return few
