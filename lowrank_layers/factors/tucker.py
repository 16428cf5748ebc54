"""The Tucker decomposition as a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError
from ..linalg import mode_product
from .base import relative_error


@dataclass(frozen=True)
class Tucker:
    """A tensor as a small core multiplied by a matrix on each mode: its Tucker decomposition.

    Args:
        core: the core tensor.
        factors: one matrix per mode; ``None`` where the mode was left whole.

    Shape:
        ``core`` ``[r_0, r_1, ...]``, ``factors[k]`` ``[n_k, r_k]``, dense ``[n_0, n_1, ...]``.

    Examples:
        >>> f = lr.tucker(torch.ones(4, 3, 2), rank=(1, 1, None))
        >>> f.rank, f.numel(), f.to_dense().shape
        ((1, 1, 2), 9, torch.Size([4, 3, 2]))
    """

    core: Tensor
    factors: tuple[Tensor | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        pairs = zip(self.core.shape, self.factors, strict=True)
        return tuple(n if factor is None else factor.shape[0] for n, factor in pairs)

    @property
    def rank(self) -> tuple[int, ...]:
        """Shape of the core."""
        return tuple(self.core.shape)

    def numel(self) -> int:
        """Number of values stored."""
        return self.core.numel() + sum(f.numel() for f in self.factors if f is not None)

    def to_dense(self) -> Tensor:
        """Multiplies the core by every factor."""
        dense = self.core
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                dense = mode_product(dense, factor, mode)
        return dense

    def truncate(self, rank: tuple[int | None, ...]) -> Tucker:
        """Keeps the leading slices of the core, as a truncated HOSVD does where the core is all-orthogonal.

        Args:
            rank: one entry per mode; ``None`` keeps a mode as it is.
        """
        if len(rank) != self.core.ndim:
            raise LowRankError(f"Tucker.truncate: got {len(rank)} ranks, expected {self.core.ndim}, one per mode.")
        core, factors = self.core, list(self.factors)
        for mode, (r, factor) in enumerate(zip(rank, self.factors, strict=True)):
            if r is None:
                continue
            check_integer(r, "truncate", "rank", 1)
            if factor is None:
                raise LowRankError(f"Tucker.truncate: mode {mode} was left whole; give None for it.")
            core = core.narrow(mode, 0, min(r, core.shape[mode]))
            factors[mode] = factor[:, :r]
        return Tucker(core, tuple(factors))

    def relative_error(self, dense: Tensor) -> float:
        """``||dense - self|| / ||dense||`` in the Frobenius norm."""
        return relative_error(self, dense)
