import pytest
import torch

import lowrank_layers as lr
from lowrank_layers import plot

from .artists import values_of


def test_pictures_stand_side_by_side_under_their_titles():
    pictures = {"grey": torch.rand(4, 6) * 3 - 1, "colour": torch.rand(5, 5, 3)}
    axes = plot.image_strip(pictures).axes
    assert [each.get_title() for each in axes] == ["grey", "colour"]
    for each, picture in zip(axes, pictures.values(), strict=True):
        torch.testing.assert_close(values_of(each), picture.clamp(0, 1))
        assert each.images[0].get_clim() == (0, 1)


def test_an_approximation_has_the_colours_of_the_matrix_and_an_error_of_its_own():
    matrix = torch.randn(7, 5)
    found = lr.svd(matrix, 2)
    left, middle, right, *_ = plot.approximation(matrix, found).axes
    torch.testing.assert_close(values_of(left), matrix)
    torch.testing.assert_close(values_of(middle), found.to_dense())
    torch.testing.assert_close(values_of(right), matrix - found.to_dense())
    assert left.images[0].get_clim() == middle.images[0].get_clim() == (matrix.min(), matrix.max())
    low, high = right.images[0].get_clim()
    assert -low == high == pytest.approx(float((matrix - found.to_dense()).abs().max()), abs=1e-6)
    tail = torch.linalg.svdvals(matrix)[2:].norm() / matrix.norm()
    assert [each.get_title() for each in (left, middle, right)] == ["original", "rank 2", f"error {float(tail):.2%}"]


def test_other_shapes_are_refused():
    with pytest.raises(lr.LowRankError, match="no pictures"):
        plot.image_strip({})
    with pytest.raises(lr.LowRankError, match=r"got shape \(3, 4, 4\) for 'channels first'"):
        plot.image_strip({"channels first": torch.rand(3, 4, 4)})
    with pytest.raises(lr.LowRankError, match="expected a matrix"):
        plot.approximation(torch.rand(3, 4, 4), lr.tucker(torch.rand(3, 4, 4), (1, 1, 1)))
    with pytest.raises(lr.LowRankError, match="the shape that was factorized"):
        plot.approximation(torch.rand(3, 4), lr.svd(torch.rand(4, 3), 1))
