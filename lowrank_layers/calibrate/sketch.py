r"""Second moments of very wide gradients as diagonal plus low rank, from sums that are linear in the moment.

Of :math:`G = E[g g^T]` its diagonal and :math:`Y = G \Omega` are taken, with few fixed random columns :math:`\Omega`;
neither needs the ``m x m`` matrix. The Nystroem approximation :math:`Y (\Omega^T Y)^+ Y^T` is exact where the rank of
:math:`G` is at most that of :math:`\Omega`, and never larger than :math:`G`, so that what it lacks on the diagonal is
not negative (Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from
streaming data", 2017). Both are stored side by side, ``[m, 1 + columns]``, and add up over data like the moment itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import check_integer
from .moments import add_to_mean_, to_unit_scale

COLUMNS = 256
"""Random columns: directions of the moment that are told from its diagonal."""
SMALLEST = 1e-6
"""Eigenvalues below this part of the largest are rounding: products are in fp32."""


class GradientSketch:
    """The running diagonal of a second moment, and its product with random columns.

    Args:
        outputs: number of outputs.
        device: where they are.
        dtype: dtype of the sums.

    Attributes:
        second: both side by side, ``[outputs, 1 + COLUMNS]``.
        rows: how many rows went in.
    """

    def __init__(self, outputs: int, device: torch.device, dtype: torch.dtype) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        self.second = torch.zeros(outputs, 1 + COLUMNS, dtype=dtype, device=device)
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        """Adds rows.

        Args:
            rows: ``[count, outputs]``.
        """
        count = rows.shape[0]
        if not count:
            return
        self.rows += count
        with torch.autocast(rows.device.type, enabled=False):
            unit, size = to_unit_scale(rows)
            columns = random_columns(rows.shape[1], COLUMNS).to(unit)
            sums = torch.cat([unit.square().sum(0)[:, None], unit.mT @ (unit @ columns)], 1)
            if size is not None:
                sums = sums.to(self.second).mul_(size.to(self.second).square())
        add_to_mean_(self.second, sums, count, self.rows)


def check_sketch_above(outputs: int | None, caller: str) -> None:
    """Raises if the width above which moments are sketched is no integer of 0 or more.

    Args:
        outputs: the number of outputs; ``None`` for never.
        caller: who was given it.

    Raises:
        LowRankError: for another value.
    """
    if outputs is not None:
        check_integer(outputs, caller, "sketch_above", 0)


def is_sketched(outputs: int, widest: int | None) -> bool:
    """Whether the moment of so many outputs is sketched.

    Args:
        outputs: number of outputs.
        widest: above how many outputs moments are; ``None`` for never.
    """
    return widest is not None and outputs > max(widest, 2 * (1 + COLUMNS))


def diagonal_plus_low_rank(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``d [m]`` and ``F [m, columns]`` in fp64 with ``diag(d) + F F^T`` about the moment.

    Its diagonal is exact.

    Args:
        sketch: what :class:`GradientSketch` took, ``[m, 1 + columns]``.
    """
    diagonal, product = sketch[:, 0].double(), sketch[:, 1:].double()
    columns = random_columns(len(sketch), product.shape[1]).to(product)
    core = columns.mT @ product
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > SMALLEST * values[-1].clamp_min(0)
    factor = product @ (vectors[:, kept] * values[kept].rsqrt())
    return (diagonal - factor.square().sum(1)).clamp_min(0), factor


@lru_cache(maxsize=1)
def random_columns(rows: int, columns: int) -> Tensor:
    """Returns the same Gaussian matrix each time, ``[rows, columns]``; it must not be written to.

    Args:
        rows: number of rows.
        columns: number of columns.
    """
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
