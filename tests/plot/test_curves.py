import pytest

import lowrank_layers as lr
from lowrank_layers import plot


def test_accuracy_against_size():
    left, right = plot.panels(2)
    plot.accuracy_against_size({"ours": [(100, 90.0), (50, 80.0)]}, dense=(200, 95.0), ax=right)
    assert list(right.get_lines()[0].get_xdata()) == [50, 100]
    assert left.figure is right.figure
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["ours", "dense"]


def test_losses_are_drawn_by_step():
    axes = plot.losses({"a": [3.0, 2.0], "b": [5.0, 1.0]}).axes[0]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 2], [1, 2]]
    assert list(axes.get_lines()[1].get_ydata()) == [5.0, 1.0]
    assert plot.losses({"c": [1.0]}, ax=axes) is axes.figure
    assert len(axes.get_lines()) == 3


def test_perplexity_against_bytes():
    axes = plot.perplexity_against_bytes({"ours": [(2048, 9.0), (1024, 8.0)]}).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]


def test_loss_against_wire_bytes():
    axes = plot.loss_against_wire_bytes({"ours": [(2**20, 9.0), (2**21, 8.0)]}).axes[0]
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]
    assert list(axes.get_lines()[0].get_ydata()) == [9.0, 8.0]


@pytest.mark.parametrize(
    "draw",
    [plot.accuracy_against_size, plot.losses, plot.perplexity_against_bytes, plot.loss_against_wire_bytes],
)
def test_no_points_is_an_error(draw):
    with pytest.raises(lr.LowRankError, match="no points"):
        draw({"ours": []})
