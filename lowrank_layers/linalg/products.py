"""Unfoldings and the two products of multilinear algebra (Kolda and Bader, 2009)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .svd import exact_svd


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Unfolds a tensor into a matrix with ``mode`` along the rows and the other modes, in order, along the columns.

    Shape:
        ``[n_0, ..., n_{d-1}]`` to ``[n_mode, prod of the others]``.

    Examples:
        >>> unfold(torch.arange(6.).reshape(1, 2, 3), 2)
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`unfold`: ``fold(unfold(t, k), k, t.shape)`` is ``t``."""
    moved = [shape[mode], *(n for axis, n in enumerate(shape) if axis != mode)]
    return matrix.reshape(moved).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies a tensor by a matrix along one mode: ``unfold(result, mode) = matrix @ unfold(tensor, mode)``.

    Shape:
        ``tensor`` ``[..., n_mode, ...]``, ``matrix`` ``[m, n_mode]``, result ``[..., m, ...]``.
    """
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Computes the column-wise Kronecker product of two matrices.

    Shape:
        ``[m, r]`` and ``[n, r]`` to ``[m * n, r]``; the left index runs slower.
    """
    return (left[:, None] * right[None]).reshape(-1, left.shape[1])


def train_product(cores: Sequence[Tensor]) -> Tensor:
    """Multiplies out a block tensor train; the digits of the first core run slowest.

    Shape:
        Cores ``[r_{k-1}, n_k, d_k, r_k]`` with ``r_0 = r_K = 1`` to ``[n_1 * ... * n_K, d_1 * ... * d_K]``.
    """
    rows, columns = cores[0].shape[1:3]
    left = cores[0].reshape(rows * columns, -1)
    for core in cores[1:]:
        _, n, d, _ = core.shape
        product = left @ core.flatten(1)
        left = product.reshape(rows, columns, n, d, -1).transpose(1, 2).reshape(rows * n * columns * d, -1)
        rows, columns = rows * n, columns * d
    return left.reshape(rows, columns)


def rounded_train(cores: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """Rounds a tensor train to smaller ranks without forming the tensor (Oseledets, 2011, algorithm 2).

    Shape:
        Cores ``[r_{k-1}, m_k, r_k]``.
    """
    work = list(cores)
    for k in range(len(work) - 1, 0, -1):
        q, r = torch.linalg.qr(work[k].flatten(1).mT)
        work[k] = q.mT.unflatten(1, work[k].shape[1:])
        work[k - 1] = work[k - 1] @ r.mT
    for k, rank in enumerate(ranks):
        u, s, vh = exact_svd(work[k].flatten(0, 1))
        work[k] = u[:, :rank].unflatten(0, work[k].shape[:2])
        work[k + 1] = torch.tensordot(s[:rank, None] * vh[:rank], work[k + 1], dims=1)
    return work
