"""Whether a matrix is worth factorizing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..linalg import check_tensor
from ..rank import pair_spectrum
from ..rank.energy import RelativeError
from .matrix_spectrum import MatrixSpectrum


@dataclass(frozen=True)
class Advice:
    """What :func:`should_factorize` advises; it prints as its reason, and is true if the answer is yes.

    Args:
        factorize: whether a pair of factors is smaller at the tolerated error.
        rank: least rank at the tolerated error.
        limit: largest rank at which a pair of factors is smaller than the matrix; 0 where there is none.
        error: relative error in the Frobenius norm at ``min(rank, limit)``.
        reason: the answer in words.
    """

    factorize: bool
    rank: int
    limit: int
    error: float
    reason: str

    def __bool__(self) -> bool:
        return self.factorize

    def __str__(self) -> str:
        return f"{'yes' if self.factorize else 'no'}: {self.reason}"


def should_factorize(weight: Tensor | MatrixSpectrum, *, error: float = 0.1) -> Advice:
    r"""Says whether two factors that approximate a matrix are smaller than the matrix, and why.

    A pair of rank ``r`` has ``r (m + n)`` entries, so that it is smaller for ``r < m n / (m + n)`` only. The least
    relative error at rank ``r`` is :math:`(\sum_{i>r} \sigma_i^2 / \sum_i \sigma_i^2)^{1/2}` (Eckart and Young, 1936).

    The weights of trained networks rarely have a small rank themselves: what matters is the error of their outputs on
    real inputs. Give the weighted spectrum of :func:`weight_spectrum` to ask about that.

    Args:
        weight: the matrix, or the kernel of a convolution, whose first dimension is taken for rows; or a spectrum.
        error: relative error that is tolerated, in (0, 1).

    Raises:
        LowRankError: for a tensor that is no finite floating point tensor of two or more dimensions, or an error that
            is no number in (0, 1).

    Examples:
        >>> weight = torch.randn(64, 4) @ torch.randn(4, 64)
        >>> print(lr.should_factorize(weight))
        yes: rank 4 keeps the relative error at 0.0% with 12.5% of the 4,096 entries.
        >>> print(lr.should_factorize(torch.eye(64)))
        no: a relative error of 10.0% needs rank 64, but a pair of factors is smaller only up to rank 31, where
        the error is 71.8%.
    """
    rule = RelativeError(error)
    spectrum = weight
    if not isinstance(spectrum, MatrixSpectrum):
        spectrum = MatrixSpectrum.of(check_tensor(spectrum, "should_factorize").flatten(1))
    rows, columns = spectrum.shape
    limit = (rows * columns - 1) // (rows + columns)
    rank = rule(pair_spectrum(rows, columns, spectrum.values, "should_factorize"))
    if limit == 0:
        reason = f"a matrix of {rows} x {columns} is not larger than a pair of factors of rank 1."
        return Advice(False, rank, 0, 1.0, reason)
    found = spectrum.error_at(min(rank, limit))
    if rank <= limit:
        kept = rank * (rows + columns) / (rows * columns)
        size = f"{kept:.1%} of the {rows * columns:,} entries"
        return Advice(True, rank, limit, found, f"rank {rank} keeps the relative error at {found:.1%} with {size}.")
    reason = (
        f"a relative error of {error:.1%} needs rank {rank}, but a pair of factors is smaller only up to rank {limit},"
        f" where the error is {found:.1%}."
    )
    return Advice(False, rank, limit, found, reason)
