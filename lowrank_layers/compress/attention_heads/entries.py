r"""Fewer entries of vectors that others are multiplied with.

Entries ``k`` are read by ``g``, as keys by queries and values by the output projection. Of all maps to ``r`` entries
the one that loses least of ``E |g^H k|^2``, with ``g`` and ``k`` apart from each other, keeps the largest eigenvectors
of ``R^H E[g g^H] R``, where ``R R^H = E[k k^H]`` (Eckart and Young, 1936). Real and complex entries alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg import psd_root

_FLOOR = 1e-10


def losses_of(readers: Tensor, moment: Tensor) -> Tensor:
    """Returns what is lost at 0, 1, 2, ... entries, ``[..., n + 1]``.

    Args:
        readers: ``E[g g^H]``, ``[..., n, n]``.
        moment: ``E[k k^H]``, ``[..., n, n]``.
    """
    captured = _decompose(readers, moment)[2]
    return torch.nn.functional.pad(captured, (0, 1)).flip(-1).cumsum(-1).flip(-1)


def maps_to(readers: Tensor, moment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the maps of readers and of entries to the best ``size`` ones, both ``[size, n]``, balanced.

    Args:
        readers: ``E[g g^H]``, ``[n, n]``.
        moment: ``E[k k^H]``, ``[n, n]``.
        size: how many entries stay.
    """
    root, inverse, captured, vectors = _decompose(readers, moment)
    kept = vectors[:, :size].mH
    least = (_FLOOR * captured[:1]).clamp_min(torch.finfo(captured.dtype).tiny)
    scale = captured[:size].clamp_min(least)[:, None] ** 0.25
    return kept @ root.mH / scale, scale * (kept @ inverse)


def refit(weight: Tensor, moment: Tensor, kept: Tensor, moved: Tensor | None = None) -> Tensor:
    """Returns the matrix that reads fewer entries and gives most of what it gave, by regression, ``[m, r]``.

    Args:
        weight: the matrix that reads all entries, ``[m, n]``.
        moment: their second moment, ``[n, n]``.
        kept: the map to those that stay, ``[r, n]``.
        moved: the second moment of what is to be given and of the entries, by default ``weight`` times ``moment``.
    """
    half = kept @ moment
    across = half @ weight.mT if moved is None else kept @ moved.mT
    return psd_root(half @ kept.mT).solve(across).mT


def _decompose(readers: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``R``, its inverse, and the eigenvalues and -vectors of ``R^H E[g g^H] R``, largest first."""
    variances, basis = torch.linalg.eigh(moment)
    least = (_FLOOR * variances[..., -1:]).clamp_min(torch.finfo(variances.dtype).tiny)
    scale = variances.clamp_min(least).sqrt()
    root, inverse = basis * scale[..., None, :], basis.mH / scale[..., None]
    values, vectors = torch.linalg.eigh(root.mH @ readers @ root)
    return root, inverse, values.flip(-1).clamp_min(0), vectors.flip(-1)
