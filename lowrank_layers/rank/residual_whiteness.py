"""Whether what a rank leaves over is white noise."""

from dataclasses import dataclass

import torch

from .rule import Spectrum

TRACY_WIDOM = 2.0234
"""The 99 % quantile of the Tracy-Widom law of order 1."""


@dataclass(frozen=True)
class ResidualWhiteness:
    r"""The least rank whose residual has the singular values of white noise, by the law of Marchenko and Pastur.

    What rank ``r`` leaves of an ``m x n`` matrix with white noise has :math:`(m - r)(n - r)` degrees of freedom, which
    estimate the noise's variance: :math:`v = \sum_{i>r} s_i^2 / ((m - r)(n - r))`. The largest squared singular value
    of a ``p x q`` matrix of noise lies at the edge of the Marchenko-Pastur law and fluctuates about it by the law of
    Tracy and Widom, so that the rule takes the least ``r`` at which

    .. math:: s_{r+1}^2 \le v \left(\mu + 2.0234\, \sigma\right), \quad \mu = (\sqrt{p} + \sqrt{q})^2, \quad
        \sigma = (\sqrt{p} + \sqrt{q}) (1 / \sqrt{p} + 1 / \sqrt{q})^{1/3}

    with ``p = m - r`` and ``q = n - r``: one residual of noise in a hundred is taken for more (Johnstone, "On the
    Distribution of the Largest Eigenvalue in Principal Components Analysis", 2001; Kritchman and Nadler,
    "Non-Parametric Detection of the Number of Signals", 2009). The level of the noise need not be known.

    Examples:
        >>> noise = 0.1 * torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> noise[:3, :3] += 20 * torch.eye(3)
        >>> lr.ResidualWhiteness()(lr.Spectrum(torch.linalg.svdvals(noise), (60, 90), [150], 5400))
        3
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        energies = spectrum.energies(self).cpu()
        ranks = torch.arange(1, len(energies))
        # a spectrum may have fewer values than the matrix has rows or columns
        rows, columns = ((size - ranks).double().sqrt() for size in spectrum.shape)
        left = energies.flip(0).cumsum(0).flip(0)[1:]
        edge = (rows + columns) ** 2 + TRACY_WIDOM * (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
        white = energies[1:] * (rows * columns) ** 2 <= left * edge
        return int(ranks[white][0]) if bool(white.any()) else max(1, len(ranks))
