import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot


def test_spectra_mark_the_chosen_rank():
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 10))
    plan = lr.make_plan(model, rank=4, skip=["2"])
    axes = plot.spectra(model, plan).axes[0]
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
    axes = plot.spectra(model, plan).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0 (rank 5x3)"]
    assert axes.get_lines()[1].get_xdata()[0] == pytest.approx(5 / 8)
    plan = lr.make_plan(model, lr.Budget(params=1.0))
    assert all(line.get_label().endswith("(dense)") for line in plot.spectra(model, plan).axes[0].get_lines())


def test_many_layers_have_no_legend_that_would_cover_them():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(13)])
    plan = lr.make_plan(model, rank=2)
    axes = plot.spectra(model, plan).axes[0]
    assert axes.get_legend() is None
    assert len(axes.get_legend_handles_labels()[1]) == 13
    assert len(plot.spectra(model, plan.drop("0")).axes[0].get_lines()) == 25


def test_a_matrix_of_zeros_keeps_a_linear_axis():
    left, right = plot.singular_values(torch.zeros(4, 3)).axes
    assert left.get_yscale() == "linear"
    assert list(right.get_lines()[0].get_ydata()) == [0, 0, 0]


def test_singular_values_and_their_energy_mark_the_rank_of_a_rule():
    matrix = torch.rand(10, 8)
    left, right = plot.singular_values(matrix, lr.Energy(0.9)).axes
    values = torch.linalg.svdvals(matrix)
    kept = values.square().cumsum(0) / values.square().sum()
    rank = int((kept < 0.9).sum()) + 1
    assert left.get_lines()[0].get_ydata() == pytest.approx(values.tolist(), rel=1e-5)
    assert right.get_lines()[0].get_ydata() == pytest.approx(kept.tolist(), rel=1e-5)
    for axes in (left, right):
        assert list(axes.get_lines()[0].get_xdata()) == list(range(1, 9))
        assert list(axes.get_lines()[1].get_xdata()) == [rank, rank]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            f"rank {rank}: {float(kept[rank - 1]):.2%} of the energy"
        ]
    assert len(plot.singular_values(matrix).axes[0].get_lines()) == 1
    assert list(plot.singular_values(matrix, 99).axes[0].get_lines()[1].get_xdata()) == [8, 8]
    with pytest.raises(lr.LowRankError, match=r"got rank 0\.5"):
        plot.singular_values(matrix, 0.5)
    with pytest.raises(lr.LowRankError, match="singular_values: got shape"):
        plot.singular_values(torch.rand(2, 3, 4))
