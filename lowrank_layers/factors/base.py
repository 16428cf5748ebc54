"""The interface of factorizations, and their relative errors."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import LowRankError
from ..linalg import Matrix, SparseMatrix, check_matrix, is_dense, scaled_to_unit, unit_scale


@runtime_checkable
class Factorization(Protocol):
    """A tensor in factors: it knows the shape of the dense tensor, its own size, and how to become dense."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""

    def numel(self) -> int:
        """Number of values stored."""

    def to_dense(self) -> Tensor:
        """Multiplies the factors out."""

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""


def relative_error(factorization: Factorization, dense: Tensor) -> float:
    """``||dense - factorization|| / ||dense||`` in the Frobenius norm, in fp64."""
    if tuple(dense.shape) != tuple(factorization.shape):
        raise LowRankError(
            f"relative_error: got a tensor of shape {tuple(dense.shape)},"
            f" expected {tuple(factorization.shape)}, the shape that was factorized."
        )
    dense = dense.detach().double()
    scale = unit_scale(dense)
    norm = torch.linalg.vector_norm(dense / scale)
    error = torch.linalg.vector_norm((dense - factorization.to_dense().detach().double()) / scale)
    return float(error / norm) if norm > 0 else float(error)


def relative_error_of_product(left: Tensor, right: Tensor, factorization: Factorization, matrix: Matrix) -> float:
    """The relative error of the factorization ``L R`` of a dense or sparse matrix, whose zeros are never formed.

    For a sparse matrix ``||X - L R||^2 = ||X||^2 - 2 <X, L R> + ||L R||^2``, accurate to about 1e-8.

    Args:
        left: ``[m, r]``.
        right: ``[r, n]``.
        factorization: the factorization that they belong to.
        matrix: the matrix ``[m, n]`` to compare with.
    """
    if is_dense(matrix):
        return relative_error(factorization, matrix)
    found = check_matrix(matrix, "relative_error")
    assert isinstance(found, SparseMatrix)
    if tuple(found.shape) != tuple(factorization.shape):
        raise LowRankError(
            f"relative_error: got a matrix of shape {tuple(found.shape)}, expected {tuple(factorization.shape)}, the"
            " shape that was factorized."
        )
    work, scale = scaled_to_unit(found.double())
    left, right = left.detach().double() / scale, right.detach().double()
    energy = float(work.values.square().sum())
    inner = float(((work @ right.mT) * left).sum())
    model = float(((left.mT @ left) * (right @ right.mT)).sum())
    error = math.sqrt(max(energy - 2 * inner + model, 0.0))
    return error / math.sqrt(energy) if energy > 0 else error * scale
