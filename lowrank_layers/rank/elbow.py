"""The elbow of the spectrum."""

from dataclasses import dataclass

import torch

from .rule import Spectrum


@dataclass(frozen=True)
class Elbow:
    """The rank before the elbow of the spectrum: the value furthest below the chord from the first to the last one.

    Examples:
        >>> lr.Elbow()(lr.Spectrum(torch.tensor([9.0, 8.0, 0.5, 0.4, 0.3]), (5, 5), [10, 20, 30, 40, 50], 25))
        2
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        values = spectrum.require_values(self)
        chord = torch.linspace(float(values[0]), float(values[-1]), len(values), dtype=values.dtype)
        return max(1, int((chord.to(values.device) - values).argmax()))
