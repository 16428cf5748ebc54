"""The exponent of the power law that the large eigenvalues of a weight's Gram matrix follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import check_tensor

SMALLEST = 1e-5
"""weightwatcher takes no eigenvalue at or below it into the fit."""
_SHORT = 20
"""Fewer eigenvalues than these are fitted with the correction of the estimate's bias."""
_LEAST = 8
"""Number of eigenvalues that a short tail has to keep."""


@dataclass(frozen=True)
class PowerLaw:
    """A density ``p(x) ~ x^-alpha`` for ``x >= xmin``, fitted to eigenvalues.

    Args:
        alpha: the exponent.
        xmin: the eigenvalue at which the tail begins.
        distance: Kolmogorov-Smirnov distance between the tail and the fit.
        tail: number of eigenvalues in the tail.
    """

    alpha: float
    xmin: float
    distance: float
    tail: int


def fit_power_law(eigenvalues: Tensor) -> PowerLaw | None:
    r"""Fits a power law to the tail of a spectrum, as weightwatcher 0.7.7 and the package powerlaw do.

    For the tail of the ``n`` eigenvalues ``x_i >= xmin`` the exponent of greatest likelihood is
    :math:`\alpha = 1 + n / \sum_i \log(x_i / x_{\min})`. Every eigenvalue but the largest is tried as ``xmin``; the fit
    whose distribution function is nearest to that of the tail is taken (Clauset, Shalizi and Newman, "Power-Law
    Distributions in Empirical Data", SIAM Review 2009; Martin and Mahoney, JMLR 2021). Where there are fewer than 20
    eigenvalues, weightwatcher replaces ``n`` in the numerator by ``n - 1`` and tries only tails of 8 or more.

    Args:
        eigenvalues: eigenvalues of ``W^T W``, that is squared singular values of the weight; those of at most 1e-5
            take no part.

    Shape:
        ``[n]``, in any order.

    Returns:
        The fit; ``None`` where there are fewer than 8 eigenvalues, or all of them are equal.

    Raises:
        LowRankError: for values that are not finite.

    Examples:
        >>> places = torch.arange(0.5, 1000, dtype=torch.float64) / 1000
        >>> fit = fit_power_law(places ** (-1 / 1.5))  # the quantiles of the density x^-2.5 on x >= 1
        >>> round(fit.alpha, 2)
        2.5
    """
    x = check_tensor(eigenvalues, "fit_power_law", ndim=1).cpu().double().sort().values
    x = x[x > SMALLEST]
    count = len(x)
    if count < _LEAST:
        return None
    log = x.log()
    tails = torch.arange(count, 0, -1, dtype=torch.float64)[:-1]
    # excess[i] = sum_{j >= i} log(x_j / x_i)
    excess = (log.flip(0).cumsum(0).flip(0)[:-1] - tails * log[:-1]).clamp_min(0)
    short = count < _SHORT
    alphas = 1 + (tails - int(short)) / excess
    usable = torch.isfinite(alphas) & (tails >= (_LEAST if short else 2)) & (excess > 1e-12)
    best = (math.inf, -1)
    for i in usable.nonzero().flatten().tolist():
        tail = x[i:]
        steps = torch.arange(len(tail), dtype=torch.float64) / len(tail)
        distance = float((1 - (tail / x[i]) ** (1 - alphas[i]) - steps).abs().max())
        best = min(best, (distance, i))
    distance, i = best
    return None if i < 0 else PowerLaw(float(alphas[i]), float(x[i]), distance, count - i)
