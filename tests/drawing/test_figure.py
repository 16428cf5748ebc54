import builtins

import matplotlib.pyplot as plt
import pytest

import lowrank_layers as lr
from lowrank_layers import plot

pytestmark = pytest.mark.usefixtures("headless")


def test_a_figure_is_saved_by_itself_or_by_its_axes(tmp_path):
    figure = plot.losses({"a": [2.0, 1.0]})
    for each, name in ((figure, "figure.png"), (figure.axes[0], "axes.png"), (plt.figure(), "foreign.png")):
        plot.save_figure(each, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_figures_follow_the_style_and_keep_their_hues():
    with plt.style.context("dark_background"):
        dark = plot.accuracy_against_size({"ours": [(100, 90.0)]}, dense=(200, 95.0))
    light = plot.accuracy_against_size({"ours": [(100, 90.0)]}, dense=(200, 95.0))
    colours = [[line.get_color() for line in figure.axes[0].get_lines()] for figure in (dark, light)]
    assert colours == [["#0072B2", "white"], ["#0072B2", "black"]]
    assert dark.get_facecolor() == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "draw",
    [plot.accuracy_against_size, plot.losses, plot.perplexity_against_bytes, plot.loss_against_wire_bytes],
)
def test_no_points_is_an_error(draw):
    with pytest.raises(lr.LowRankError, match="no points"):
        draw({"ours": []})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(lr.MissingExtraError, match=r"lowrank-layers\[plot\]"):
        plot.panels(1)
