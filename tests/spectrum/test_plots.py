"""What the results draw is what they hold."""

import math

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot

pytestmark = pytest.mark.usefixtures("headless")


def layers():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))


def names_in(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_a_matrix_spectrum_marks_the_rank_of_a_rule():
    spectrum = lr.MatrixSpectrum(torch.tensor([3.0, 1.0, 1.0]).double(), (3, 5))
    left, right = spectrum.plot(lr.Energy(0.9)).axes
    assert list(left.get_lines()[0].get_ydata()) == [3, 1, 1]
    assert right.get_lines()[0].get_ydata() == pytest.approx([9 / 11, 10 / 11, 1])
    assert list(right.get_lines()[1].get_xdata()) == [2, 2]
    with pytest.raises(lr.LowRankError, match="got rank 0"):
        spectrum.plot(0)


def test_the_decay_of_weights_beside_that_of_weighted_ones():
    model = layers()
    found = lr.weight_spectrum(model, lr.calibrate(model, [torch.randn(64, 12)]))
    for axes, kind in zip(found.plot().axes, ("raw", "weighted"), strict=True):
        assert names_in(axes.get_legend()) == ["0", "2"]
        for line, layer in zip(axes.get_lines(), found, strict=True):
            values = getattr(layer, kind).values
            assert line.get_ydata() == pytest.approx((values / values[0]).tolist())
            assert line.get_xdata()[-1] == 1
    assert len(lr.weight_spectrum(model).plot().axes) == 1


def test_the_variance_that_components_explain():
    found = lr.activation_spectrum(layers(), [torch.randn(64, 12)])
    axes = found.plot().axes[0]
    for line, layer in zip(axes.get_lines(), found, strict=True):
        assert line.get_ydata() == pytest.approx(layer.explained_variance_ratio.cumsum(0).tolist())
    assert names_in(axes.get_legend())[0].startswith("0 (effective rank ")


def test_capacity_draws_one_row_per_layer():
    model = layers()
    found = lr.capacity(model, [torch.randn(64, 12)])
    axes = found.plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert [bar.get_width() for bar in axes.patches] == [12, 5]
    rank, weight, output = (list(line.get_xdata()) for line in axes.get_lines())
    assert rank == [each.rank for each in found]
    assert weight == [each.weight_dimension for each in found]
    assert output == [each.output_dimension for each in found]
    assert len(lr.capacity(model).plot().axes[0].get_lines()) == 2


def test_a_residual_draws_its_singular_values():
    weight = torch.randn(10, 6)
    axes = lr.residual_report(weight, lr.svd(weight, 2)).plot().axes[0]
    left = torch.linalg.svdvals(weight)[2:].tolist()
    assert axes.get_lines()[0].get_ydata()[:4] == pytest.approx(left, rel=1e-4)


def test_a_trajectory_draws_its_path():
    path = torch.randn(6, 40, dtype=torch.float64)
    found = lr.trajectory_spectrum([{"w": row} for row in path])
    left, right = found.plot().axes
    assert left.get_lines()[0].get_ydata() == pytest.approx(found.explained.cumsum(0).tolist())
    drawn = torch.as_tensor(right.get_lines()[0].get_xydata())
    torch.testing.assert_close(drawn, torch.cat([torch.zeros(1, 2).double(), found.projections[:, :2]]))
    for mark, place in zip(right.get_lines()[1:], (drawn[0], drawn[-1]), strict=True):
        assert mark.get_xydata()[0].tolist() == place.tolist()


def test_two_checkpoints_have_one_direction():
    right = lr.trajectory_spectrum([{"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 2.0, 0.0])}]).plot().axes[1]
    path = right.get_lines()[0].get_xydata()
    assert abs(path[1][0]) == 2
    assert path[1][1] == 0
    assert right.get_ylabel() == "direction 2 (0.0%)"


def measured(step, *values):
    leading = lr.LeadingSpectrum(values, math.nan if not values else math.hypot(*values))
    return lr.SpectrumRecord(step, {"0.weight": leading, "2.weight": leading}, {"0.weight": leading}, {})


def test_curves_of_all_matrices_and_of_one():
    records = [measured(10, 4.0, 2.0), measured(20), measured(30, 8.0, 6.0)]
    left, right = plot.monitor_curves(records).axes
    assert names_in(left.get_legend()) == ["0.weight", "2.weight"]
    assert list(left.get_lines()[1].get_xdata()) == [10, 20, 30]
    assert left.get_lines()[1].get_ydata() == pytest.approx([4, math.nan, 8], nan_ok=True)
    assert right.get_lines()[0].get_ydata() == pytest.approx([1.25, math.nan, 1.5625], nan_ok=True)
    left, right = plot.monitor_curves(records, "gradients", "0.weight").axes
    assert left.get_lines()[1].get_ydata() == pytest.approx([2, math.nan, 6], nan_ok=True)
    assert len(left.get_lines()) == 2
    assert len(right.get_lines()) == 1


def test_a_monitor_draws_its_records():
    monitor = lr.SpectrumMonitor(layers(), k=3)
    with pytest.raises(lr.LowRankError, match="no records of weights"):
        monitor.plot()
    spectrum = monitor.measure().weights["0.weight"]
    left = monitor.plot(name="0.weight").axes[0]
    assert [line.get_ydata()[0] for line in left.get_lines()] == list(spectrum.singular_values)
    with pytest.raises(lr.LowRankError, match=r"got name='1', expected one of 0\.weight, 2\.weight"):
        monitor.plot(name="1")
    with pytest.raises(lr.LowRankError, match="got kind='loss'"):
        monitor.plot("loss")
