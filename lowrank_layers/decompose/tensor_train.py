"""Tensor trains by successive singular value decompositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..linalg import leading_eigenvectors, scaled_to_unit
from .svd import svd

_STRIP = 8192
"""How many columns are brought to fp64 at once."""


def tensor_trains(tensor: Tensor, ranks: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
    r"""One train for each of several ranks, by TT-SVD (Oseledets, 2011).

    Unfolding after unfolding is split by its truncated SVD. With :math:`\varepsilon_k` the best error of the ``k``-th
    unfolding at its rank, the error is at most :math:`\sqrt{\sum_k \varepsilon_k^2}`, so within :math:`\sqrt{d - 1}` of
    the best train of those ranks. The first unfolding, by far the largest one, is decomposed once for all of them.

    Args:
        tensor: in the dtype to compute in; Gram matrices are formed in fp64.
        ranks: for each train its bonds, one fewer than there are modes, none above what its unfolding can have.

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
    """``A ~ L R`` with the leading singular subspaces; ``L`` has orthonormal columns (at the last bond either side)."""
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
    """``A A^T`` in fp64, without the whole of ``A`` in fp64."""
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for strip in matrix.split(_STRIP, dim=1):
        wide = strip.double()
        gram.addmm_(wide, wide.mT)
    return gram
