"""What rank rules are given that need factorizations of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import is_integer, is_number
from ..errors import LowRankError
from ..factors import Factorization
from ..linalg import Matrix


@dataclass(frozen=True)
class Refit:
    """A tensor, and how it is factorized at any rank.

    Args:
        tensor: the tensor whose rank is chosen.
        fit: from a tensor, a rank and a seed to the factorization. With a seed the start is a random one; ``None`` asks
            for the best factorization that is known.
    """

    tensor: Matrix
    fit: Callable[[Any, int, int | None], Factorization]


def check_ranks(ranks: object, who: str) -> None:
    """Raises for what is no sequence of ranks to try."""
    if not isinstance(ranks, Sequence) or not ranks or not all(is_integer(rank, 1) for rank in ranks):
        raise LowRankError(f"{who}: got ranks={ranks!r}, expected integers of at least 1, as in range(1, 11).")


def check_finite(value: object, who: str, name: str) -> None:
    """Raises for what is no finite number."""
    if not is_number(value) or not abs(value) < float("inf"):
        raise LowRankError(f"{who}: got {name}={value!r}, expected a finite number.")
