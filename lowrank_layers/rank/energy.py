"""Rules on the energy, the sum of squared singular values, that is kept or lost."""

from dataclasses import dataclass

from .rule import Spectrum, check_fraction


@dataclass(frozen=True)
class Energy:
    """The least rank that keeps ``fraction`` of the energy: ``sum_{i<=r} s_i^2 >= fraction * sum s_i^2``.

    Args:
        fraction: fraction of the energy to keep, in (0, 1].

    Examples:
        >>> lr.Energy(0.9)(lr.Spectrum(torch.tensor([3.0, 1.0, 0.1]), (3, 3), [6, 12, 18], 9))
        2
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "Energy", closed=True)

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        kept = spectrum.energies(self).cumsum(0)
        return int((kept < self.fraction * kept[-1]).sum()) + 1


@dataclass(frozen=True)
class RelativeError:
    """The least rank whose relative Frobenius error is at most ``bound``.

    Args:
        bound: largest relative error allowed, in (0, 1).

    Examples:
        >>> lr.RelativeError(0.5)(lr.Spectrum(torch.tensor([3.0, 1.0, 0.1]), (3, 3), [6, 12, 18], 9))
        1
    """

    bound: float

    def __post_init__(self) -> None:
        check_fraction(self.bound, "RelativeError", closed=False)

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        energy = spectrum.energies(self)
        # summed from the small end, which loses nothing: tail[r] is the squared error of rank r
        tail = energy.flip(0).cumsum(0).flip(0)
        return max(1, int((tail > self.bound**2 * tail[0]).sum()))
