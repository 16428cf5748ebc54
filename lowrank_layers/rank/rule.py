"""Rank rules, and how a ``rank=`` argument becomes an integer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..checks import is_integer, is_number
from ..errors import LowRankError
from ..linalg import scaled_to_unit
from .refit import Refit


@dataclass(frozen=True)
class Spectrum:
    """The spectrum and the sizes that a rank rule chooses by.

    Args:
        values: singular values, largest first; ``None`` where the factorization has none (CP).
        shape: rows and columns of the matrix that they belong to.
        sizes: numbers stored at rank 1, 2, ...
        dense: numbers stored when dense.
        owner: name of the function or layer that asks, for messages.
        refit: gives the tensor itself and its factorizations of other ranks; ``None`` where there are none.
    """

    values: Tensor | None
    shape: tuple[int, int]
    sizes: Sequence[int]
    dense: int
    owner: str = "rank rule"
    refit: Callable[[], Refit] | None = None

    def require_values(self, rule: object) -> Tensor:
        """The singular values in fp64, or an error that names the remedy."""
        if self.values is None:
            raise LowRankError(
                f"{self.owner}: got {rule}, but this factorization has no singular values;"
                " give an integer or ParameterFraction."
            )
        return self.values.double()

    def require_refit(self, rule: object) -> Refit:
        """The tensor and its factorizations, or an error that names the remedy."""
        if self.refit is None:
            raise LowRankError(
                f"{self.owner}: got {rule}, but here no single tensor is factorized at several ranks;"
                " give an integer or ParameterFraction."
            )
        return self.refit()

    def ranks_below_full(self, ranks: Sequence[int]) -> list[int]:
        """Those of the ranks that are below the largest of use, which is exact for any tensor; rank 1 if none is."""
        return sorted({rank for rank in ranks if rank < len(self.sizes)}) or [1]

    def energies(self, rule: object) -> Tensor:
        """The squares of the singular values in fp64, in a unit in which the largest one is between 1 and 4."""
        return scaled_to_unit(self.require_values(rule))[0].square()


@runtime_checkable
class RankRule(Protocol):
    """A callable from a :class:`Spectrum` to a rank of at least 1."""

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""


class WithoutValues:
    """Base of rules that read no singular values, so that none are computed for them."""


Rank = int | RankRule
"""A rank: an integer, or a rule that chooses it from a spectrum."""


def check_rank(rank: object, who: str) -> None:
    """Raises for what is neither an integer of at least 1 nor a rule."""
    if is_integer(rank, 1) or (callable(rank) and not isinstance(rank, type)):
        return
    hint = ""
    if isinstance(rank, float):
        hint = f" For a fraction of the parameters write ParameterFraction({rank})."
    elif isinstance(rank, type):
        hint = f" Call the rule: {rank.__name__}(...)."
    raise LowRankError(
        f"{who}: got rank {rank!r}, expected an integer of at least 1 or a rank rule such as Energy(0.95).{hint}"
    )


def choose_rank(rank: Rank, spectrum: Spectrum, limit: int) -> int:
    """The integer that ``rank`` means for this spectrum, at most ``limit``."""
    check_rank(rank, spectrum.owner)
    chosen = rank if isinstance(rank, int) else rank(spectrum)
    if not is_integer(chosen, 1):
        raise LowRankError(f"{spectrum.owner}: the rule {rank} returned {chosen!r}, expected an integer of at least 1.")
    return min(chosen, limit)


def pair_spectrum(
    rows: int,
    columns: int,
    values: Tensor | None,
    owner: str,
    refit: Callable[[], Refit] | None = None,
    *,
    pivot: bool = False,
) -> Spectrum:
    """The spectrum of a matrix that becomes a pair of factors, for a rank rule.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        values: its singular values, where they are known.
        owner: who asks, for messages.
        refit: what rules are given that look at several ranks.
        pivot: whether the pair takes its pivot form, which has ``r * r`` fewer numbers.
    """
    sizes = [rank * (rows + columns - pivot * rank) for rank in range(1, min(rows, columns) + 1)]
    return Spectrum(values, (rows, columns), sizes, rows * columns, owner, refit)


def check_fraction(value: object, who: str, *, closed: bool) -> None:
    """Raises for what is no number in (0, 1], or in (0, 1) unless ``closed``."""
    if not is_number(value) or not (0 < value < 1 or (closed and value == 1)):
        raise LowRankError(f"{who}: got {value!r}, expected a number in (0, 1{']' if closed else ')'}.")
