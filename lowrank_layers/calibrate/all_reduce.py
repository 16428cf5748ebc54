"""Adding up statistics over processes: each shows the others its outline, then their tensors are summed one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LowRankError
from .layer_stats import LayerStats
from .moments import Moments
from .readable import Unread, Value, read

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None) -> tuple[list[T], int]:
    """Returns what every process of the group gave, and this one's place among them.

    Args:
        value: what can be pickled, and is not ``None``.
        group: the processes; ``None`` is all.

    Raises:
        LowRankError: if there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise LowRankError("all_reduce: there is no process group yet; call dist.init_process_group first.")
    found: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return [each for each in found if each is not None], dist.get_rank(group)


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
    values: Sequence[Value], weights: Sequence[float], group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Returns the sum over the processes, one of whose values is this one's own and all others are outlines.

    Args:
        values: the values of those processes that have one.
        weights: one number per value.
        group: the processes; ``None`` is all.
        device: where the sum goes.
    """
    total = torch.zeros(values[0].shape, dtype=torch.float64, device=device)
    for value, weight in zip(values, weights, strict=True):
        if isinstance(value, Tensor) or value.read is not _elsewhere:
            total.add_(read(value).to(total), alpha=weight)
    shared = total.cuda() if dist.get_backend(group) == "nccl" else total  # NCCL takes no tensors on the CPU
    dist.all_reduce(shared, group=group)
    return shared.to(device)


def _shape(value: Value) -> Unread:
    return Unread(tuple(value.shape), _elsewhere)


def _elsewhere() -> Tensor:
    raise LowRankError("all_reduce: this tensor is in another process.")
