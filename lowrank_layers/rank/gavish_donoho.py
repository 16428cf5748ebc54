"""The optimal hard threshold of Gavish and Donoho."""

from dataclasses import dataclass

from .rule import Spectrum


@dataclass(frozen=True)
class GavishDonoho:
    """Keeps singular values above the optimal hard threshold for white noise of unknown level.

    ``s > (0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43) * median(s)`` with ``b = m / n <= 1``
    (Gavish and Donoho, "The Optimal Hard Threshold for Singular Values is 4/sqrt(3)", 2014).

    Examples:
        >>> noise = 0.1 * torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
        >>> noise[:3, :3] += 20 * torch.eye(3)
        >>> lr.GavishDonoho()(lr.Spectrum(torch.linalg.svdvals(noise), (60, 90), [150], 5400))
        3
    """

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        values = spectrum.require_values(self)
        b = min(spectrum.shape) / max(spectrum.shape)
        threshold = (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * values.quantile(0.5)
        return max(1, int((values > threshold).sum()))
