"""The effective rank."""

from dataclasses import dataclass

import torch

from .rule import Spectrum


@dataclass(frozen=True)
class EffectiveRank:
    """The effective rank ``exp(-sum p_i log p_i)`` with ``p_i = s_i / sum s_j``, rounded to the nearest integer.

    It is the exponential of the entropy of the normalized singular values (Roy and Vetterli, "The Effective Rank: A
    Measure of Effective Dimensionality", 2007). It equals the rank where all nonzero singular values are equal. Since
    it takes singular values themselves and not their squares, a floor of noise raises it far above the rank of the
    signal; on a trained weight it says how flat the spectrum is, not where it ends.

    Examples:
        >>> lr.EffectiveRank()(lr.Spectrum(torch.tensor([2.0, 2.0, 1.0, 0.1]), (4, 4), [8, 16, 24, 32], 16))
        3
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        values = spectrum.require_values(self)
        if float(values[0]) == 0:
            return 1
        return max(1, round(float(torch.special.entr(values / values.sum()).sum().exp())))
