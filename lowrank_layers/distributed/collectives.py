"""Means over processes, through process groups of their own."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LowRankError
from .traffic import Clock


def place() -> tuple[int, int]:
    """This process' number, and how many there are."""
    _check_started()
    return dist.get_rank(), dist.get_world_size()


def own_group(group: dist.ProcessGroup | None, timeout: timedelta | None) -> dist.ProcessGroup:
    """A new group of the same processes: what goes through it cannot be taken for another's."""
    _check_started()
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    made = dist.new_group(ranks, timeout=timeout, backend=dist.get_backend(group), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _check_started() -> None:
    if not dist.is_initialized():
        raise LowRankError("LowRankCommState: there is no process group yet; call dist.init_process_group first.")


class Mean:
    """Averages tensors in place; over the processes of a node first, if there is a group of them.

    Its own groups are made at once, or in the first backward where ``init_process_group`` was not called before.

    Args:
        group: of all processes, or of those of the same place in each node.
        node: of the processes of a node.
        timeout: of a collective.
    """

    def __init__(self, group: dist.ProcessGroup | None, node: dist.ProcessGroup | None, timeout: timedelta | None):
        self._given, self._timeout = group, timeout
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.start()
        self.node = None if node is None else own_group(node, timeout)
        self.clock = Clock()  # of exchanges, waiting for other processes included

    def start(self) -> None:
        """Makes the group, where that is still to be done."""
        if self._group is None:
            self._group = own_group(self._given, self._timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """Its own, of all processes or of those of the same place in each node."""
        assert self._group is not None
        return self._group

    @property
    def size(self) -> int:
        """Processes in the group."""
        return self.group.size()

    def within_node_(self, tensor: Tensor) -> None:
        """Among the processes of the node, as it is."""
        if self.node is not None:
            with self.clock.running():
                dist.all_reduce(tensor.div_(self.node.size()), group=self.node)

    def over_(self, tensor: Tensor) -> None:
        """Over the group."""
        with self.clock.running():
            dist.all_reduce(tensor.div_(self.size), group=self.group)

    def exchanged(self, rows: Tensor) -> Tensor:
        """Row ``k`` goes to process ``k``; what comes back is one row of each process."""
        received = torch.empty_like(rows)
        with self.clock.running():
            dist.all_to_all_single(received, rows, group=self.group)
        return received

    def gathered(self, row: Tensor) -> Tensor:
        """The rows ``[1, ...]`` of all processes."""
        rows = row.new_empty(self.size, *row.shape[1:])
        with self.clock.running():
            dist.all_gather(list(rows.split(1)), row, group=self.group)
        return rows

    def agree_(self, tensor: Tensor) -> None:
        """What the first process of the group has."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    def greatest_(self, tensor: Tensor) -> None:
        """The greatest of all processes."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
