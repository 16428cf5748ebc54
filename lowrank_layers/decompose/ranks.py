"""Ranks of matrix and CP decompositions: turns rank arguments into integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import LowRankError
from ..linalg import SparseMatrix, scaled_to_unit
from ..rank import Rank, Refit, Spectrum, WithoutValues, check_rank, choose_rank, pair_spectrum


def matrix_rank(rank: Rank, matrix: Tensor | SparseMatrix, owner: str, refit: Callable[[], Refit] | None = None) -> int:
    """Turns a rank argument into an integer for a matrix; a rule gets the singular values, and refits if it asks."""
    check_rank(rank, owner)
    rows, columns = matrix.shape
    values = None if isinstance(rank, int | WithoutValues) else singular_values(matrix, owner)
    return choose_rank(rank, pair_spectrum(rows, columns, values, owner, refit), min(rows, columns))


def cp_limit(shape: Sequence[int]) -> int:
    """Returns the largest CP rank of use for a tensor: the product of all modes but the largest."""
    return math.prod(shape) // max(shape)


def cp_rank(rank: Rank, shape: Sequence[int], owner: str, refit: Callable[[], Refit] | None = None) -> int:
    """Turns a rank argument into an integer for a CP decomposition, which has no singular values to look at."""
    limit = cp_limit(shape)
    sizes = range(sum(shape), sum(shape) * limit + 1, sum(shape))
    spectrum = Spectrum(None, (shape[0], shape[1]), sizes, math.prod(shape), owner, refit)
    return choose_rank(rank, spectrum, limit)


def singular_values(matrix: Tensor | SparseMatrix, owner: str) -> Tensor:
    """Returns the singular values in fp64, largest first; their norm may overflow in the dtype of the matrix."""
    scaled, scale = scaled_to_unit(matrix)
    if isinstance(scaled, SparseMatrix) and math.prod(scaled.shape) > SMALL:
        short = min(scaled.shape)
        if short > 4096:
            raise LowRankError(
                f"{owner}: got a rank rule and a sparse matrix of shape {tuple(scaled.shape)}, whose {short} singular"
                " values would all be needed; give an integer rank, ParameterFraction or RankFraction."
            )
        wide = scaled.double()
        squares: Tensor = torch.linalg.eigvalsh((wide if scaled.shape[0] == short else wide.mT).gram())
        return squares.flip(0).clamp_min(0).sqrt() * scale
    values: Tensor = torch.linalg.svdvals(scaled if isinstance(scaled, Tensor) else scaled.to_dense())
    return values.double() * scale


SMALL = 2**22
"""Size, zeros included, up to which a sparse matrix is made dense: that costs little and loses no digits."""


def small_to_dense(matrix: SparseMatrix, owner: str) -> Tensor:
    """Makes a sparse matrix dense, or raises if it is too large."""
    if math.prod(matrix.shape) > SMALL:
        raise LowRankError(
            f"{owner}: got method 'exact' and a sparse matrix of shape {tuple(matrix.shape)}, which would have to be"
            " made dense; take method 'auto', or call to_dense() where the memory allows it."
        )
    return matrix.to_dense()
