import pytest
import torch

import lowrank_layers as lr
from lowrank_layers import plot

from .artists import values_of


def test_cp_factors_share_their_colours():
    found = lr.cp(torch.randn(6, 5, 4), 3)
    axes = plot.cp_factors(found).axes[:3]
    bound = max(float(factor.abs().max()) for factor in found.factors)
    for mode, (each, factor) in enumerate(zip(axes, found.factors, strict=True)):
        assert each.get_title() == f"mode {mode}"
        torch.testing.assert_close(values_of(each), factor)
        assert each.images[0].get_clim() == pytest.approx((-bound, bound))


def test_nmf_shows_basis_coefficients_and_their_product():
    matrix = torch.rand(9, 7) + 0.1
    found = lr.nmf(matrix, 2)
    axes = plot.nmf_factors(matrix, found).axes[:4]
    for each, values in zip(axes, (matrix, found.w, found.h, found.w @ found.h), strict=True):
        torch.testing.assert_close(values_of(each), values)
    assert axes[0].images[0].get_clim() == axes[3].images[0].get_clim()
    assert axes[3].get_title() == f"W H (error {found.relative_error(matrix):.2%})"
    with pytest.raises(lr.LowRankError, match="the shape that was factorized"):
        plot.nmf_factors(matrix.mT, found)
