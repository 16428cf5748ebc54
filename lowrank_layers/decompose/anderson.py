"""Anderson acceleration of fixed-point iterations, many side by side."""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 5
"""Number of earlier steps that a new one is extrapolated from."""


class Anderson:
    """Extrapolates the iterates of ``x <- g(x)`` (Anderson, 1965; in the form of Walker and Ni, 2011).

    The next iterate is ``g_k - sum_i c_i (g_{i+1} - g_i)``, with the coefficients that make the same combination of the
    residuals ``g(x) - x`` shortest. Each row is an iteration of its own.

    Shape:
        Iterates ``[B, n]`` in fp64.
    """

    def __init__(self, x: Tensor) -> None:
        self.values = x.new_zeros(len(x), DEPTH, x.shape[1])
        self.residuals = torch.zeros_like(self.values)
        self.value = self.residual = torch.zeros_like(x)
        self.accepted = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        self.steps = 0

    def keep(self, rows: Tensor) -> None:
        """Keeps these iterations and gives up the others."""
        self.values, self.residuals = self.values[rows], self.residuals[rows]
        self.value, self.residual, self.accepted = self.value[rows], self.residual[rows], self.accepted[rows]

    def next(self, x: Tensor, value: Tensor, accepted: Tensor) -> Tensor:
        """Returns the next iterates, for values ``g(x)``; where not ``accepted`` ``[B]`` a row forgets its history."""
        residual, keep = value - x, accepted[:, None]
        at = self.steps % DEPTH
        self.values[:, at] = value - self.value
        self.residuals[:, at] = residual - self.residual
        # a difference from what was not accepted, or from nothing, is none
        self.residuals[:, at] *= self.accepted
        self.residuals *= keep[:, :, None]
        self.value, self.residual, self.accepted = value, residual, keep
        self.steps += 1
        gram = torch.bmm(self.residuals, self.residuals.mT)
        size = gram.diagonal(dim1=-2, dim2=-1)
        # relative to the largest difference, for those that are nearly dependent; absolute, for those that are zero
        size.add_(1e-12 * size.amax(-1, keepdim=True) + 1e-200)
        coefficients = torch.linalg.solve_ex(gram, torch.bmm(self.residuals, residual[:, :, None]))[0]
        return value - torch.bmm(coefficients.mT, self.values)[:, 0]
