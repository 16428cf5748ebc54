import pytest
import torch

import lowrank_layers as lr
from lowrank_layers import plot


def test_every_value_is_a_point_in_its_place():
    tensor = torch.randn(4, 3, 2)
    found = lr.tucker(tensor, (2, 2, 1))
    axes = plot.tensor_scatter(tensor, found).axes[:3]
    assert [each.get_title() for each in axes] == [
        "original, 4 x 3 x 2",
        "core, 2 x 2 x 1",
        f"reconstruction (error {found.relative_error(tensor):.2%}), 4 x 3 x 2",
    ]
    for each, values in zip(axes, (tensor, found.core, found.to_dense()), strict=True):
        points = each.collections[0]
        x, y, z = (torch.tensor(list(axis)).long() for axis in points._offsets3d)
        assert len(x) == values.numel()
        # the order of the points is matplotlib's, by depth
        assert sorted(points.get_array()) == pytest.approx(sorted(values.flatten().tolist()), abs=1e-6)
        assert {*zip(x.tolist(), y.tolist(), z.tolist(), strict=True)} == {
            tuple(place) for place in torch.ones(values.shape).nonzero().tolist()
        }
    assert axes[0].collections[0].get_clim() == axes[2].collections[0].get_clim()


def test_a_decomposition_without_a_core_has_two_panels():
    tensor = torch.randn(4, 3, 2)
    figure = plot.tensor_scatter(tensor, lr.cp(tensor, 2))
    titles = [each.get_title() for each in figure.axes if each.name == "3d"]
    assert titles[0] == "original, 4 x 3 x 2"
    assert len(titles) == 2
    with pytest.raises(lr.LowRankError, match="three axes"):
        plot.tensor_scatter(torch.rand(3, 3), lr.svd(torch.rand(3, 3), 1))
