"""The integers that rank rules mean for a tensor that is decomposed."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ..errors import LowRankError
from ..linalg import SparseMatrix, scaled_to_unit, unfold
from ..rank import ParameterFraction, Rank, RankRule, Spectrum, check_rank, choose_rank, pair_spectrum


def matrix_rank(rank: Rank, matrix: Tensor | SparseMatrix, owner: str) -> int:
    """An integer is clamped to the shorter side; a rule looks at the singular values."""
    check_rank(rank, owner)
    rows, columns = matrix.shape
    values = None if isinstance(rank, int | ParameterFraction) else singular_values(matrix, owner)
    return choose_rank(rank, pair_spectrum(rows, columns, values, owner), min(rows, columns))


def mode_ranks(rank: RankRule | Sequence[Rank | None], tensor: Tensor, owner: str) -> list[int | None]:
    """One rank for each mode; a rule looks at the singular values of the unfolding of its mode.

    ``ParameterFraction`` takes the modes that it is given for in proportion to their sizes, beside the ranks that the
    others have.
    """
    shape = tensor.shape
    each = _one_a_mode(rank, tensor.ndim, owner)
    chosen: list[int | None] = []
    for mode, (r, n) in enumerate(zip(each, shape, strict=True)):
        if r is None or isinstance(r, ParameterFraction):
            chosen.append(None)
            continue
        columns = tensor.numel() // n
        values = None if isinstance(r, int) else singular_values(unfold(tensor, mode), owner)
        sizes = range(n + columns, (n + columns) * n + 1, n + columns)
        chosen.append(choose_rank(r, Spectrum(values, (n, columns), sizes, tensor.numel(), owner), n))
    shared = {mode: r for mode, r in enumerate(each) if isinstance(r, ParameterFraction)}
    if shared:
        steps = max(shape[mode] for mode in shared)
        path = [_in_proportion(chosen, shape, shared, step / steps) for step in range(1, steps + 1)]
        stored = [_tucker_size(ranks, shape) for ranks in path]
        for mode, fraction in shared.items():
            spectrum = Spectrum(None, (shape[mode], tensor.numel() // shape[mode]), stored, tensor.numel(), owner)
            chosen[mode] = path[fraction(spectrum) - 1][mode]
    return chosen


def cp_rank(rank: Rank, shape: Sequence[int], owner: str) -> int:
    """Clamped to the largest rank that a tensor of this shape can have; there are no singular values to look at."""
    check_rank(rank, owner)
    limit = math.prod(shape) // max(shape)
    sizes = range(sum(shape), sum(shape) * limit + 1, sum(shape))
    return choose_rank(rank, Spectrum(None, (shape[0], shape[1]), sizes, math.prod(shape), owner), limit)


def singular_values(matrix: Tensor | SparseMatrix, owner: str) -> Tensor:
    """Largest first, in fp64: the norm of a matrix may be beyond what its own dtype holds."""
    scaled, scale = scaled_to_unit(matrix)
    if isinstance(scaled, SparseMatrix) and math.prod(scaled.shape) > SMALL:
        short = min(scaled.shape)
        if short > 4096:
            raise LowRankError(
                f"{owner}: got a rank rule and a sparse matrix of shape {tuple(scaled.shape)}, whose {short} singular"
                " values would all be needed; give an integer rank or ParameterFraction."
            )
        wide = scaled.double()
        squares: Tensor = torch.linalg.eigvalsh((wide if scaled.shape[0] == short else wide.mT).gram())
        return squares.flip(0).clamp_min(0).sqrt() * scale
    values: Tensor = torch.linalg.svdvals(scaled if isinstance(scaled, Tensor) else scaled.to_dense())
    return values.double() * scale


SMALL = 2**22
"""Numbers in a sparse matrix, zeros included, up to which it is made dense: that costs little, and loses no digits."""


def small_to_dense(matrix: SparseMatrix, owner: str) -> Tensor:
    """With its zeros, unless they are too many."""
    if math.prod(matrix.shape) > SMALL:
        raise LowRankError(
            f"{owner}: got method 'exact' and a sparse matrix of shape {tuple(matrix.shape)}, which would have to be"
            " made dense; take method 'auto', or call to_dense() where the memory allows it."
        )
    return matrix.to_dense()


def _one_a_mode(rank: object, ndim: int, owner: str) -> list[Rank | None]:
    if not isinstance(rank, Sequence) or isinstance(rank, str):
        if isinstance(rank, int | float | str | type) or not callable(rank):
            raise LowRankError(
                f"{owner}: got rank {rank!r}, expected one entry a mode, as in {(1,) * ndim}, or one rule for all;"
                " None leaves a mode whole."
            )
        return [rank] * ndim
    if len(rank) != ndim:
        raise LowRankError(f"{owner}: got {len(rank)} ranks for {ndim} modes; None leaves a mode whole.")
    for r in rank:
        if r is not None:
            check_rank(r, owner)
    return list(rank)


def _in_proportion(
    fixed: Sequence[int | None], shape: Sequence[int], shared: Container[int], part: float
) -> list[int | None]:
    return [max(1, round(part * shape[mode])) if mode in shared else r for mode, r in enumerate(fixed)]


def _tucker_size(ranks: Sequence[int | None], shape: Sequence[int]) -> int:
    core = math.prod(n if r is None else r for r, n in zip(ranks, shape, strict=True))
    return core + sum(r * n for r, n in zip(ranks, shape, strict=True) if r is not None)
