"""A fraction of full rank."""

from dataclasses import dataclass

from .rule import Spectrum, WithoutValues, check_fraction


@dataclass(frozen=True)
class RankFraction(WithoutValues):
    """The largest rank of at most ``fraction`` of full rank: ``floor(fraction * min(m, n))`` for a matrix, at least 1.

    At half of full rank the factors of a square matrix hold as many values as the matrix itself; to ask for a fraction
    of the parameters, use :class:`ParameterFraction`. For CP full rank is the largest rank of use, the product of all
    modes but the largest.

    Args:
        fraction: fraction of full rank, in (0, 1].

    Examples:
        >>> lr.LowRankLinear.from_dense(nn.Linear(256, 120), rank=lr.RankFraction(0.25)).rank
        30
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "RankFraction", closed=True)

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        return max(1, int(self.fraction * len(spectrum.sizes)))
