"""Unfoldings and the two products of multilinear algebra (Kolda and Bader, 2009)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The matrix whose rows are indexed by ``mode`` and whose columns run over the others in order.

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
    """Undoes :func:`unfold`: ``fold(unfold(t, k), k, t.shape)`` is ``t``."""
    moved = [shape[mode], *(n for axis, n in enumerate(shape) if axis != mode)]
    return matrix.reshape(moved).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies ``matrix`` onto one mode: ``unfold(result, mode) = matrix @ unfold(tensor, mode)``.

    Shape:
        ``tensor`` ``[..., n_mode, ...]``, ``matrix`` ``[m, n_mode]``, result ``[..., m, ...]``.
    """
    product: Tensor = torch.tensordot(matrix, tensor, dims=([1], [mode]))
    return product.movedim(0, mode)


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """The column-wise Kronecker product.

    Shape:
        ``[m, r]`` and ``[n, r]`` to ``[m * n, r]``, the left index running slower.
    """
    return (left[:, None] * right[None]).reshape(-1, left.shape[1])
