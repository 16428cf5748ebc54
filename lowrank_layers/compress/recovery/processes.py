"""What the processes of a data-parallel model do together; without one, all of it is local."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Processes:
    """The processes that train replicas of a model.

    Args:
        model: the model; only if :class:`torch.nn.parallel.DistributedDataParallel` wraps it there are several.
    """

    def __init__(self, model: nn.Module) -> None:
        self._group: Any = model.process_group if isinstance(model, DistributedDataParallel) else None
        self.rank = 0 if self._group is None else dist.get_rank(self._group)

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Returns the sums over processes.

        Args:
            values: the numbers of this process.
            device: where they are added.
        """
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, group=self._group)
        summed: list[float] = tensor.tolist()
        return summed

    @torch.no_grad()
    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values, in place."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self._group, 0), group=self._group)

    def from_first(self, function: Callable[[], T]) -> T:
        """Returns what a function returns in the first process, or raises in all what it raises there."""
        if self._group is None:
            return function()
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = function()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, dist.get_global_rank(self._group, 0), group=self._group)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result
