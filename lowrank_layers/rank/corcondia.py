"""The core consistency diagnostic of CP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowRankError
from ..factors import CP
from ..linalg import is_dense, mode_product, scaled_to_unit
from .refit import check_finite, check_ranks
from .rule import Spectrum, WithoutValues


@dataclass(frozen=True)
class CORCONDIA(WithoutValues):
    """The last CP rank before the core consistency falls below ``least``; see :func:`core_consistency`.

    Above 90 the tensor is as good as trilinear at that rank; values near 50 are doubtful, and at too large a rank they
    fall far below 0 (Bro and Kiers, "A New Efficient Method for Determining the Number of Components in PARAFAC
    Models", 2003). It speaks of ranks up to the size of the smallest mode. Where white noise is more than about a
    hundredth of the tensor, a component that fits nothing but noise overlaps with no other and is consistent:
    :class:`FactorMatch` and :class:`CrossValidation` find the rank there.

    Args:
        ranks: the ranks to try, from the smallest on. The largest rank of use is left out.
        least: the smallest core consistency that counts, at most 100.

    Examples:
        >>> a, b, c = torch.randn(9, 3), torch.randn(8, 3), torch.randn(7, 3)
        >>> tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
        >>> lr.cp(tensor + 0.01 * torch.randn(9, 8, 7), lr.CORCONDIA()).rank
        3
    """

    ranks: Sequence[int] = range(1, 11)
    least: float = 80.0

    def __post_init__(self) -> None:
        check_ranks(self.ranks, "CORCONDIA")
        check_finite(self.least, "CORCONDIA", "least")

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        refit = spectrum.require_refit(self)
        chosen = 1
        for rank in spectrum.ranks_below_full(self.ranks):
            found = refit.fit(refit.tensor, rank, None)
            if not isinstance(found, CP) or not is_dense(refit.tensor):
                raise LowRankError(f"{spectrum.owner}: got {self}, which needs a CP decomposition; give it to cp.")
            if core_consistency(refit.tensor, found) < self.least:
                break
            chosen = rank
        return chosen


def core_consistency(tensor: Tensor, found: CP) -> float:
    r"""The core consistency ``100 (1 - ||G - I||^2 / r)`` of a CP decomposition (CORCONDIA).

    ``G`` is the best Tucker core for the factors, the tensor times their pseudo-inverses, and ``I`` has ones on its
    superdiagonal. It is 100 where no interaction of components would improve the fit (Bro and Kiers, 2003).

    Args:
        tensor: the tensor that was decomposed.
        found: its decomposition.

    Shape:
        ``[n_0, ..., n_{d-1}]``.

    Raises:
        LowRankError: for a tensor of another shape.

    Examples:
        >>> a, b, c = torch.randn(9, 2), torch.randn(8, 2), torch.randn(7, 2)
        >>> exact = lr.CP(torch.ones(2), (a, b, c))
        >>> round(lr.core_consistency(exact.to_dense(), exact), 2)
        100.0
    """
    if tuple(tensor.shape) != found.shape:
        raise LowRankError(f"core_consistency: got a tensor of shape {tuple(tensor.shape)}, expected {found.shape}.")
    core, scale = scaled_to_unit(tensor.detach().double())
    # the norms of the components are spread evenly over the modes
    root = (found.weights.double() / scale) ** (1 / core.ndim)
    for mode, factor in enumerate(found.factors):
        core = mode_product(core, torch.linalg.pinv(factor.double() * root), mode)
    identity = torch.zeros_like(core)
    identity[(torch.arange(found.rank, device=core.device),) * core.ndim] = 1
    return 100 * (1 - float((core - identity).square().sum()) / found.rank)
