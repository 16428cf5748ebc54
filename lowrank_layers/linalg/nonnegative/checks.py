"""Checks of the input and the options of non-negative matrix factorization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...checks import check_integer, is_number
from ...errors import LowRankError
from ..sparse import SparseMatrix

Loss = Literal["frobenius", "kl"]


@dataclass(frozen=True)
class Stopping:
    """When an iteration ends.

    Args:
        sweeps: largest number of sweeps.
        tolerance: relative change below which it ends earlier.
    """

    sweeps: int
    tolerance: float

    def check(self, who: str) -> None:
        """Raises unless both are numbers of at least 0."""
        check_integer(self.sweeps, who, "sweeps", 0)
        if not (is_number(self.tolerance) and 0 <= self.tolerance < math.inf):
            raise LowRankError(f"{who}: got tolerance={self.tolerance!r}, expected a number of at least 0.")


def check_choice(choice: object, known: Sequence[str], who: str, name: str) -> None:
    """Raises unless an argument is one of the known words.

    Args:
        choice: what the argument got.
        known: the words that it can be.
        who: name of the caller, for the message.
        name: name of the argument, for the message.
    """
    if choice not in known:
        *others, last = map(repr, known)
        raise LowRankError(f"{who}: got {name} {choice!r}, expected {', '.join(others)} or {last}.")


def check_nonnegative(matrix: Tensor | SparseMatrix, who: str) -> None:
    """Raises if a matrix has entries below zero."""
    entries = matrix if isinstance(matrix, Tensor) else matrix.values
    least = float(entries.min()) if entries.numel() else 0.0
    if least < 0:
        raise LowRankError(
            f"{who}: got a negative entry ({least:.4g}), expected none below zero; shift the matrix,"
            " clip it with .clamp_min(0), or use svd."
        )
