"""The stable rank."""

from dataclasses import dataclass

from .rule import Spectrum


@dataclass(frozen=True)
class StableRank:
    """The stable rank ``||W||_F^2 / ||W||_2^2 = sum s_i^2 / s_1^2``, rounded to the nearest integer.

    It never exceeds the rank and hardly moves under small perturbations (Rudelson and Vershynin, "Sampling from Large
    Matrices", 2007). It equals the rank where all nonzero singular values are equal; the faster they fall, the
    smaller it is.

    Examples:
        >>> lr.StableRank()(lr.Spectrum(torch.tensor([2.0, 2.0, 1.0, 0.1]), (4, 4), [8, 16, 24, 32], 16))
        2
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        energies = spectrum.energies(self)
        return max(1, round(float(energies.sum() / energies[0]))) if float(energies[0]) > 0 else 1
