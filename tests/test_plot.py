import builtins

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot


@pytest.fixture(autouse=True)
def _headless():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")


def test_spectra_mark_the_chosen_rank():
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 10))
    plan = lr.make_plan(model, rank=4, skip=["2"])
    axes = plot.spectra(model, plan)
    line, mark = axes.get_lines()
    assert mark.get_xdata()[0] == pytest.approx(4 / 10)
    values = torch.linalg.svdvals(model[0].weight.detach())
    assert mark.get_ydata()[0] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
    assert len(line.get_xdata()) == 11
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0 (rank 4)"]


def test_spectra_name_tucker_ranks_and_layers_that_stay_dense():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    plan = lr.make_plan(model, rank=3, methods=[lr.TuckerMethod()])
    plan.set_rank("0", (5, 3))
    axes = plot.spectra(model, plan)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0 (rank 5x3)"]
    assert axes.get_lines()[1].get_xdata()[0] == pytest.approx(5 / 8)
    plan = lr.make_plan(model, lr.Budget(params=1.0))
    assert all(line.get_label().endswith("(dense)") for line in plot.spectra(model, plan).get_lines())


def test_accuracy_against_size_and_saving(tmp_path):
    left, right = plot.panels(2)
    plot.accuracy_against_size({"ours": [(100, 90.0), (50, 80.0)]}, dense=(200, 95.0), ax=right)
    assert list(right.get_lines()[0].get_xdata()) == [50, 100]
    plot.save_figure(right, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert left.figure is right.figure
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["ours", "dense"]


def test_losses_are_drawn_by_step():
    axes = plot.losses({"a": [3.0, 2.0], "b": [5.0, 1.0]})
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1, 2], [1, 2]]
    assert list(axes.get_lines()[1].get_ydata()) == [5.0, 1.0]
    assert plot.losses({"c": [1.0]}, ax=axes) is axes
    assert len(axes.get_lines()) == 3


def test_a_recovery_shows_its_objective_and_the_state_that_was_kept():
    result = lr.Recovery(losses=(2.0, 1.0), scores=((0, 0.5), (1, 0.75), (2, 0.25)), best_step=1)
    axes = plot.recovery(result)
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]
    scores, kept = axes.figure.axes[1].get_lines()
    assert list(scores.get_ydata()) == [0.5, 0.75, 0.25]
    assert list(kept.get_xydata()[0]) == [1, 0.75]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["objective", "held-out score", "kept"]
    assert len(plot.recovery(lr.Recovery((1.0,), (), 1)).figure.axes) == 1


def test_a_progression_shows_its_stages_and_the_model_that_was_kept():
    def stage(params: int, *scores: float) -> lr.Stage:
        return lr.Stage(lr.Budget(params=params), params, lr.Recovery((1.0,), tuple(enumerate(scores)), 1))

    result = lr.Progression(100, 0.9, (stage(50, 0.5, 0.8), stage(20, 0.1, 0.4)), kept=1)
    factorized, recovered, kept = plot.progression(result).get_lines()
    assert factorized.get_xydata().tolist() == [[50, 0.5], [20, 0.1]]
    assert recovered.get_xydata().tolist() == [[100, 0.9], [50, 0.8], [20, 0.4]]
    assert kept.get_xydata().tolist() == [[50, 0.8]]
    with pytest.raises(lr.LowRankError, match="a history without scores"):
        plot.progression(lr.Progression(100, None, (), 0))


def test_perplexity_against_bytes():
    axes = plot.perplexity_against_bytes({"ours": [(2048, 9.0), (1024, 8.0)]})
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]


def test_loss_against_wire_bytes():
    axes = plot.loss_against_wire_bytes({"ours": [(2**20, 9.0), (2**21, 8.0)]})
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2]
    assert list(axes.get_lines()[0].get_ydata()) == [9.0, 8.0]


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
