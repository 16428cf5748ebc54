r"""Which hidden units a layer can do without, and the map that makes up for them.

A layer ``W`` reads units ``x`` with second moment ``X``. From the columns ``S`` alone the best map is
``W X_{:,S} X_{SS}^{-1}``: what the others would have said is predicted from those that stay. The error grows by
``tr(B_j P_{jj}^{-1} B_j^T)`` if the columns ``j`` of one more unit go, with ``B`` the weighted map so far and ``P`` the
inverse of ``X`` over its columns (Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", 1993).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg import full_precision, psd_root
from ..regression import Regression


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go.

    Args:
        units: all but one of them.
        growth: by how much the loss grows with each.
    """

    units: list[int]
    growth: list[float]


@full_precision
def eliminate(problem: Regression, count: int) -> Elimination:
    """Returns the order in which the units of a layer go, at each step the one whose loss is least.

    Args:
        problem: the layer's weighted problem; its columns are those of the units in order.
        count: the number of units.
    """
    weighted = problem.outputs.root.times(problem.weight)
    inverse = problem.inputs.root.solve(torch.eye(weighted.shape[1]).to(weighted))
    size = len(inverse) // count
    columns = torch.arange(len(inverse), device=inverse.device).unflatten(0, (count, size))
    left = list(range(count))
    order: list[int] = []
    growth: list[float] = []
    while len(left) > 1:
        blocks = inverse[columns[left][:, :, None], columns[left][:, None, :]]
        maps = weighted[:, columns[left]].movedim(1, 0)
        losses = (maps @ torch.linalg.inv(blocks) * maps).sum((1, 2))
        best = int(losses.argmin())
        unit = left.pop(best)
        order.append(unit)
        growth.append(0.5 * problem.scale * float(losses[best]))
        gone = columns[unit]
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weighted = weighted - weighted[:, gone] @ share
        inverse = inverse - inverse[:, gone] @ share
    return Elimination(order, growth)


@full_precision
def map_from(problem: Regression, columns: Tensor) -> Tensor:
    """Returns the best map that reads only these columns, ``[m, len(columns)]``."""
    moment = problem.inputs.matrix
    return psd_root(moment[columns][:, columns]).solve((problem.weight @ moment[:, columns]).mT).mT
