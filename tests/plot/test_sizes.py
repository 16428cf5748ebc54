import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot


@pytest.mark.parametrize("cost", ["params", "macs", "bytes"])
def test_a_plan_has_two_bars_per_layer(cost):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    chosen = lr.make_plan(model, rank=4, stats=lr.calibrate(model, [torch.randn(8, 32)])).drop("2")
    axes = plot.plan(chosen, cost=cost).axes[0]
    before, after = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert before == [getattr(entry.before, cost) for entry in chosen]
    assert after == [getattr(entry.after, cost) for entry in chosen]
    assert after[0] < before[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0: svd 4", "2: dense"]
    assert [text.get_text() for text in axes.texts] == [f" {after[0] / before[0]:.0%}", " 100%"]


def test_a_plan_without_layers_and_an_unknown_cost_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(lr.LowRankError, match="got cost 'latency'"):
        plot.plan(lr.make_plan(model, rank=2), cost="latency")
    with pytest.raises(lr.LowRankError, match="a plan without layers"):
        plot.plan(lr.Plan.from_model(nn.ReLU()))


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_no_point_of_the_front_is_beaten(higher_is_better):
    sign = 1 if higher_is_better else -1
    points = {"SVD": [(10, 3 * sign), (20, 5 * sign), (40, 5 * sign)], "Tucker": [(10, 4 * sign), (30, 2 * sign)]}
    front, svd, tucker = plot.size_score_front(points, higher_is_better=higher_is_better).axes[0].get_lines()
    assert front.get_xydata().tolist() == [[10, 4 * sign], [20, 5 * sign]]
    assert svd.get_xydata().tolist() == [list(point) for point in points["SVD"]]
    assert tucker.get_xydata().tolist() == [list(point) for point in points["Tucker"]]
    with pytest.raises(lr.LowRankError, match="no points"):
        plot.size_score_front({"SVD": []})
