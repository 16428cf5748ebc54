"""The covariance of rows that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningCovariance:
    """Mean and covariance of rows, without keeping them, in fp64.

    Each batch is centred by its own mean before it is added (Chan, Golub and LeVeque, 1983), so that a large mean costs
    no digits.

    Args:
        n: number of columns.
        device: where the sums are kept.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        self.rows = 0
        self.mean = torch.zeros(n, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(n, n, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Adds rows.

        Shape:
            ``[count, n]``.
        """
        if not len(rows):
            return
        rows = rows.to(self.mean.device).double()
        mean = rows.mean(0)
        shift = mean - self.mean
        centred = rows - mean
        total = self.rows + len(rows)
        self._scatter.addmm_(centred.mT, centred)
        self._scatter.addr_(shift, shift, alpha=self.rows * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.rows = total

    def covariance(self) -> Tensor:
        """Returns the unbiased covariance, over ``rows - 1``."""
        return self._scatter / max(1, self.rows - 1)
