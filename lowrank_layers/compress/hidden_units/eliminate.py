r"""Which hidden units a layer can do without, and the map that makes up for them.

A layer ``W`` reads units ``x`` with second moment ``X``. From the columns ``S`` alone the best map is
``W X_{:,S} X_{SS}^{-1}``: what the others would have said is predicted from those that stay. The error grows by
``tr(B_j P_{jj}^{-1} B_j^T)`` if the columns ``j`` of one more unit go, with ``B`` the weighted map so far and ``P`` the
inverse of ``X`` over its columns (Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ...linalg import full_precision, psd_root
from ..regression import Regression

AT_ONCE = 128
"""Of so many units that are left, one goes at a time; of twice as many two."""


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go.

    Args:
        units: all but one of them.
        growth: by how much the loss grows with each; those that go together have the mean.
    """

    units: list[int]
    growth: list[float]

    def losses(self, rank: int) -> tuple[float]:
        """Returns by how much the loss grows by the layer that reads the units.

        Args:
            rank: how many of them stay.
        """
        return (self._grown[len(self.units) + 1 - rank],)

    def losses_alone(self, rank: int) -> tuple[float]:
        """Returns the same: the sizes by themselves change nothing.

        Args:
            rank: how many of them stay.
        """
        return self.losses(rank)

    def kept(self, rank: int) -> Tensor:
        """Returns the units that stay, ascending.

        Args:
            rank: how many stay.
        """
        count = len(self.units) + 1
        return torch.tensor(sorted({*range(count)} - {*self.units[: count - rank]}))

    @cached_property
    def _grown(self) -> list[float]:
        """By how much the loss grows with 0, 1, 2, ... of them."""
        return [0.0, *accumulate(self.growth)]


@full_precision
def eliminate(problem: Regression, count: int) -> Elimination:
    """Returns the order in which the units of a layer go, at each step the one whose loss is least, or the few.

    Where 256 units or more are left, a 128th of them goes at a time: 1,536 units take 512 steps in place of 1,535.

    Args:
        problem: the layer's weighted problem; its columns are those of the units in order.
        count: the number of units.
    """
    weighted = problem.outputs.root.times(problem.weight)
    inverse = problem.inputs.root.solve(torch.eye(weighted.shape[1]).to(weighted))
    size = len(inverse) // count
    columns = torch.arange(len(inverse), device=inverse.device).unflatten(0, (count, size))
    units = torch.arange(count, device=inverse.device)
    left = units
    order: list[int] = []
    growth: list[float] = []
    while len(left) > 1:
        blocks = inverse[columns[left][:, :, None], columns[left][:, None, :]]
        maps = weighted.unflatten(1, (-1, size)).movedim(1, 0)[left]
        losses = (maps @ torch.linalg.inv(blocks) * maps).sum((1, 2))
        go = losses.argsort(stable=True)[: max(1, len(left) // AT_ONCE)]
        gone = columns[left[go]].flatten()
        share, across = inverse[gone], weighted[:, gone]
        solved = torch.linalg.solve(share[:, gone], torch.cat([share, across.mT], 1))
        loss = float((solved[:, len(inverse) :].mT * across).sum())
        order += units[left[go]].tolist()
        growth += [0.5 * problem.scale * loss / len(go)] * len(go)
        weighted.addmm_(across, solved[:, : len(inverse)], alpha=-1)
        inverse.addmm_(share.mT, solved[:, : len(inverse)], alpha=-1)
        left = left[torch.ones_like(left, dtype=torch.bool).index_fill_(0, go, value=False)]
        if 4 * len(left) < 3 * len(units):  # what is gone is zero, and in the way
            kept = columns[left].flatten()
            weighted, inverse, units = weighted[:, kept], inverse[kept][:, kept], units[left]
            left, columns = torch.arange(len(left), device=left.device), columns[: len(left)]
    return Elimination(order, growth)


@full_precision
def map_from(problem: Regression, columns: Tensor) -> Tensor:
    """Returns the best map that reads only these columns, ``[m, len(columns)]``."""
    moment = problem.inputs.matrix
    moved = problem.weight @ moment[:, columns] if problem.moved is None else problem.moved[:, columns]
    return psd_root(moment[columns][:, columns]).solve(moved.mT).mT
