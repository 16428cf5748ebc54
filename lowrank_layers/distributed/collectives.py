"""Collectives over processes, through process groups of their own."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LowRankError
from .stats import Stopwatch


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    _check_initialized()
    return dist.get_rank(), dist.get_world_size()


class Collectives:
    """Means, gathers and broadcasts over the processes that share gradients.

    They go through new process groups, so that they cannot be mixed up with the collectives of others. The groups are
    made at once, or by :meth:`start` where ``init_process_group`` was not called yet.

    Args:
        group: the processes that share gradients; with ``node_group``, one process per node. ``None`` is all.
        node_group: the processes of a node, whose gradients are averaged first; ``None`` is none.
        timeout: time limit of a collective; ``None`` is torch's default.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, node_group: dist.ProcessGroup | None, timeout: timedelta | None
    ) -> None:
        self._given, self._timeout = group, timeout
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.start()
        self.node_group = None if node_group is None else _new_group(node_group, timeout)
        self.stopwatch = Stopwatch()  # of collectives, waiting for other processes included

    def start(self) -> None:
        """Makes the process group unless it is there already."""
        if self._group is None:
            self._group = _new_group(self._given, self._timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """The new process group."""
        assert self._group is not None
        return self._group

    @property
    def size(self) -> int:
        """Number of processes in the group."""
        return self.group.size()

    def node_mean_(self, tensor: Tensor) -> None:
        """Averages a tensor in place over the processes of the node, if there is a group of them."""
        if self.node_group is not None:
            with self.stopwatch.running():
                dist.all_reduce(tensor.div_(self.node_group.size()), group=self.node_group)

    def mean_(self, tensor: Tensor) -> None:
        """Averages a tensor in place over the group."""
        with self.stopwatch.running():
            dist.all_reduce(tensor.div_(self.size), group=self.group)

    def max_(self, tensor: Tensor) -> None:
        """Takes the elementwise maximum over the group, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrites a tensor with that of the first process of the group."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Sends row ``k`` to process ``k``; returns one row from each process."""
        received = torch.empty_like(rows)
        with self.stopwatch.running():
            dist.all_to_all_single(received, rows, group=self.group)
        return received

    def all_gather(self, row: Tensor) -> Tensor:
        """The rows ``[1, ...]`` of all processes, one below the other."""
        rows = row.new_empty(self.size, *row.shape[1:])
        with self.stopwatch.running():
            dist.all_gather(list(rows.split(1)), row, group=self.group)
        return rows


def _new_group(group: dist.ProcessGroup | None, timeout: timedelta | None) -> dist.ProcessGroup:
    """A new group of the same processes."""
    _check_initialized()
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    new = dist.new_group(ranks, timeout=timeout, backend=dist.get_backend(group), use_local_synchronization=True)
    assert isinstance(new, dist.ProcessGroup)
    return new


def _check_initialized() -> None:
    if not dist.is_initialized():
        raise LowRankError("LowRankCommState: there is no process group yet; call dist.init_process_group first.")
