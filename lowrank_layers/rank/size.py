"""Rules on the number of parameters."""

import bisect
from dataclasses import dataclass

from .rule import Spectrum, WithoutValues, check_fraction


@dataclass(frozen=True)
class ParameterFraction(WithoutValues):
    """The largest rank whose factors hold at most ``fraction`` of the dense weight's parameters.

    For a matrix ``[m, n]`` that is ``floor(fraction * m * n / (m + n))``, and at least 1.

    Args:
        fraction: fraction of the dense weight's parameters, in (0, 1].

    Examples:
        >>> lr.LowRankLinear.from_dense(nn.Linear(256, 120), rank=lr.ParameterFraction(0.5)).rank
        40
    """

    fraction: float

    def __post_init__(self) -> None:
        check_fraction(self.fraction, "ParameterFraction", closed=True)

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        return max(1, bisect.bisect_right(spectrum.sizes, self.fraction * spectrum.dense))
