"""What several processes do together, each with a part of the data; without others, all of it is local."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import LowRankError

T = TypeVar("T")


class Processes:
    """The processes of a group.

    Args:
        group: the group; ``None`` for this process alone.

    Attributes:
        rank: the place of this process among them.
        count: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group: Any = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, model: nn.Module) -> Processes:
        """Returns those that train replicas of a model.

        Args:
            model: the model; only if :class:`torch.nn.parallel.DistributedDataParallel` wraps it there are several.
        """
        return cls(model.process_group if isinstance(model, DistributedDataParallel) else None)

    @classmethod
    def all(cls) -> Processes:
        """Returns all processes of ``torch.distributed``, where it was initialized."""
        there = dist.is_available() and dist.is_initialized()
        return cls(dist.group.WORLD if there else None)

    @classmethod
    def within(cls, group: dist.ProcessGroup | None) -> Processes:
        """Returns those of a group.

        Args:
            group: the processes; ``None`` is all.

        Raises:
            LowRankError: if there is no process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise LowRankError("all_reduce: there is no process group yet; call dist.init_process_group first.")
        return cls(dist.group.WORLD if group is None else group)

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Returns the sums over processes.

        Args:
            values: the numbers of this process.
            device: where they are added.
        """
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        summed: list[float] = self.summed(tensor).tolist()
        return summed

    def gather(self, value: T) -> list[T]:
        """Returns what every process gave, by rank.

        Args:
            value: what can be pickled.
        """
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    @torch.no_grad()
    def average_(self, means: Iterable[Tensor], count: int) -> int:
        """Makes means over the items of each process those over all, in place; returns how many items all have.

        Args:
            means: the means over the items of this process.
            count: the number of its items.
        """
        if self._group is None:
            return count
        total = sum(self.gather(count))
        for mean in means:
            mean.copy_(self.summed(mean * (count / max(1, total))))
        return total

    @torch.no_grad()
    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values, in place."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self._group, 0), group=self._group)

    def from_first(self, function: Callable[[], T]) -> T:
        """Returns what a function returns in the first process, or raises in all what it raises there.

        Args:
            function: the function, which only the first process calls; what it returns can be pickled.
        """
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

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum over processes, on the same device.

        Args:
            tensor: what this process adds; it may be written to.
        """
        if self._group is None:
            return tensor
        shared = tensor.cuda() if dist.get_backend(self._group) == "nccl" else tensor  # NCCL takes none on the CPU
        dist.all_reduce(shared, group=self._group)
        return shared.to(tensor.device)
