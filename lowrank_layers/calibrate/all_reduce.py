"""Adding up statistics over processes: each shows the others its outline, then their tensors are summed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import LowRankError
from .layer_stats import LayerStats
from .moments import Moments
from .processes import Processes
from .readable import Unread, Value, read


def outline(layers: Mapping[str, LayerStats]) -> dict[str, LayerStats]:
    """Returns the statistics with the shapes of their tensors only; layers that share moments share the outline.

    Args:
        layers: the statistics by layer.
    """
    known: dict[int, Moments] = {}
    found = {}
    for name, layer in layers.items():
        mean, second = vars(layer.inputs)["mean"], vars(layer.inputs)["second"]
        moments = known.setdefault(id(layer.inputs), Moments(_shape(mean), _shape(second), layer.inputs.rows))
        others = {key: _shape(value) for key, value in vars(layer).items() if isinstance(value, Value)}
        found[name] = LayerStats(**{**vars(layer), **others, "inputs": moments})
    return found


def reduced_sum(
    values: Sequence[Value], weights: Sequence[float], processes: Processes, device: torch.device
) -> Tensor:
    """Returns the sum over the processes, one of whose values is this one's own and all others are outlines.

    Args:
        values: the values of those processes that have one.
        weights: one number per value.
        processes: the processes.
        device: where the sum goes.
    """
    total = torch.zeros(values[0].shape, dtype=torch.float64, device=device)
    for value, weight in zip(values, weights, strict=True):
        if isinstance(value, Tensor) or value.read is not _elsewhere:
            total.add_(read(value).to(total), alpha=weight)
    return processes.summed(total)


def _shape(value: Value) -> Unread:
    return Unread(tuple(value.shape), _elsewhere)


def _elsewhere() -> Tensor:
    raise LowRankError("all_reduce: this tensor is in another process.")
