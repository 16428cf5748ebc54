"""Matrices as a product of two factors, ``[m, r]`` and ``[r, n]``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import SVD
from ..linalg import exact_svd, working_dtype
from ..rank import Rank, Refit, choose_rank, pair_spectrum
from .svd import svd


def truncated_pair(matrix: Tensor, rank: Rank, owner: str, *, pivot: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the balanced pair ``(U sqrt(S), sqrt(S) V^T)`` of a matrix, at an integer rank or by a rule.

    Args:
        matrix: what is factorized.
        rank: an integer or a rank rule.
        owner: who asks, for messages.
        pivot: whether rules count the numbers of the pivot form.
    """
    rows, columns = matrix.shape
    known = isinstance(rank, int)
    # singular values may overflow in half precision where their square roots do not
    wide = matrix.to(working_dtype(matrix))
    full = None if known else svd(wide)
    values = None if full is None else full.s
    spectrum = pair_spectrum(rows, columns, values, owner, lambda: svd_refit(wide), pivot=pivot)
    chosen = choose_rank(rank, spectrum, min(rows, columns))
    up, down = (svd(wide, chosen) if full is None else full.truncate(chosen)).pair()
    return up.to(matrix.dtype), down.to(matrix.dtype)


def svd_refit(matrix: Tensor) -> Refit:
    """What rules are given that look at truncated SVDs of several ranks."""
    return Refit(matrix, lambda tensor, rank, _: svd(tensor, rank))


def pair_factors(up: Tensor, down: Tensor) -> SVD:
    """Computes the SVD of ``up @ down`` from the QR decompositions of both, without forming the product."""
    dtype = up.dtype
    left, right = torch.linalg.qr(up.detach().double()), torch.linalg.qr(down.detach().double().mT)
    u, s, vh = exact_svd(left.R @ right.R.mT)
    return SVD((left.Q @ u).to(dtype), s.to(dtype), (vh @ right.Q.mT).to(dtype))


def grouped_pairs(matrix: Tensor, rank: Rank, owner: str, *, pivot: bool = False) -> tuple[Tensor, Tensor]:
    """Factorizes a stack of matrices ``[groups, rows, columns]`` into pairs of the same rank, as one is.

    Args:
        matrix: the stack.
        rank: an integer or a rank rule.
        owner: who asks, for messages.
        pivot: whether rules count the numbers of the pivot form.
    """
    if len(matrix) > 1 and not isinstance(rank, int):
        values = torch.linalg.svdvals(matrix.double()).square().mean(0).sqrt()
        rows, columns = matrix.shape[1:]
        rank = choose_rank(rank, pair_spectrum(rows, columns, values, owner, pivot=pivot), min(rows, columns))
    lasts, firsts = zip(*(truncated_pair(each, rank, owner, pivot=pivot) for each in matrix), strict=True)
    return torch.stack(lasts), torch.stack(firsts)
