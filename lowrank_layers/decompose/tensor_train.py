"""Tensor trains by successive singular value decompositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..linalg import leading_eigenvectors, scaled_to_unit
from .svd import svd

_STRIP = 8192
"""Number of columns that are converted to fp64 at once."""


def tensor_trains(tensor: Tensor, ranks: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
    r"""Decomposes a tensor into one tensor train for each of several ranks, by TT-SVD (Oseledets, 2011).

    One unfolding after the other is split by its truncated SVD. If :math:`\varepsilon_k` is the best error of the
    ``k``-th unfolding at its rank, the error is at most :math:`\sqrt{\sum_k \varepsilon_k^2}`, so within
    :math:`\sqrt{d - 1}` of the best train of those ranks. The first unfolding, by far the largest, is decomposed once
    for all ranks.

    Args:
        tensor: the tensor, in the dtype to compute in; Gram matrices are formed in fp64.
        ranks: bond ranks of each train, one fewer than there are modes, none above that of its unfolding.

    Shape:
        ``[m_1, ..., m_d]`` to cores ``[r_{k-1}, m_k, r_k]`` with ``r_0 = r_d = 1``.
    """
    modes = tensor.shape
    tensor, scale = scaled_to_unit(tensor)
    last = len(modes) - 2
    basis, rest = _split(tensor.reshape(modes[0], -1), max(rank[0] for rank in ranks), last=last == 0)
    for rank in ranks:
        cores = [basis[:, : rank[0]].reshape(1, modes[0], -1)]
        left = rest[: rank[0]]
        for k in range(1, len(modes) - 1):
            core, left = _split(left.reshape(rank[k - 1] * modes[k], -1), rank[k], last=k == last)
            cores.append(core.reshape(rank[k - 1], modes[k], -1))
        cores.append((left * scale).reshape(rank[-1], modes[-1], 1))
        yield cores


def _split(matrix: Tensor, rank: int, *, last: bool) -> tuple[Tensor, Tensor]:
    """Splits ``A`` into ``L R`` by its leading singular vectors.

    ``L`` has orthonormal columns; at the last bond ``R`` may have orthonormal rows instead.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        left = leading_eigenvectors(_gram(matrix), rank).to(matrix.dtype)
        return left, left.mT @ matrix
    if last:
        right = leading_eigenvectors(_gram(matrix.mT), rank).to(matrix.dtype)
        return matrix @ right, right.mT
    found = svd(matrix, rank)
    return found.u, found.s[:, None] * found.vh


def _gram(matrix: Tensor) -> Tensor:
    """Computes ``A A^T`` in fp64 without a copy of all of ``A`` in fp64."""
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for strip in matrix.split(_STRIP, dim=1):
        wide = strip.double()
        gram.addmm_(wide, wide.mT)
    return gram
