"""A product of two factors in pivot form: some columns of the product, and the coefficients of the others."""

from torch import Tensor

from ..linalg import full_precision, pivot_rows


@full_precision
def pivot_columns(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrites ``up @ down`` as ``r`` of its columns and the coefficients by which the others follow from these.

    It is the same matrix, exact to rounding in fp64, in ``r (m + n - r)`` numbers in place of ``r (m + n)``.

    Args:
        up: ``[m, r]``.
        down: ``[r, n]``, with ``r`` at most ``n``.

    Returns:
        The pivot columns ``[m, r]``, the coefficients ``[r, n - r]``, both in fp64, and the order of the columns
        ``[n]``: pivots first.
    """
    order, coefficients = pivot_rows(down.mT)
    columns = up.double() @ down.double()[:, order[: len(down)]]
    return columns, coefficients.mT, order
