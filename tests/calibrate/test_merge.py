"""Statistics of parts of the data add up to those of all of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .merge_cases import Energy, assert_equal, cases

CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2, 3)], ids=str)
def test_parts_add_up_to_the_whole(name, with_loss, cuts):
    model, batches, options = CASES[name]
    loss = Energy() if with_loss else None
    parts = [batches[a:b] for a, b in zip((0, *cuts), (*cuts, len(batches)), strict=True)]
    first, *others = (lr.calibrate(model, part, loss, **options) for part in parts)
    whole = lr.calibrate(model, batches, loss, **options)
    merged = first.merge(*others)
    assert_equal(merged, whole)
    assert merged.mask == whole.mask


def test_labels_that_are_drawn_in_one_stream_give_the_same_statistics():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(count, 6) for count in (5, 3, 8)]
    loss = lr.SampledCrossEntropy()
    merged = lr.calibrate(model, batches[:2], loss).merge(lr.calibrate(model, batches[2:], loss))
    assert_equal(merged, lr.calibrate(model, batches, lr.SampledCrossEntropy()))


def test_layers_that_are_counted_but_not_calibrated_cost_their_mean():
    model = nn.Sequential(nn.Linear(6, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    short, long = torch.randn(2, 3, 6), torch.randn(3, 9, 6)
    merged = lr.calibrate(model, [short]).merge(lr.calibrate(model, [long]))
    whole = lr.calibrate(model, [short, long])
    assert whole.other_macs > 0
    assert abs(merged.other_macs - whole.other_macs) <= 1  # each part is rounded


def test_layers_that_shared_moments_still_do():
    layer = lr.calibrate(nn.Linear(4, 4), [torch.randn(5, 4)])[""]
    copied = dataclasses.replace(layer, inputs=dataclasses.replace(layer.inputs))
    shared = lr.Statistics({"q": layer, "k": dataclasses.replace(layer, repeats=2.0)}, samples=5)
    apart = lr.Statistics({"q": layer, "k": copied}, samples=5)
    merged = shared.merge(shared)
    assert merged["q"].inputs is merged["k"].inputs
    assert merged["q"].inputs.rows == 10
    assert shared.merge(apart)["q"].inputs is not shared.merge(apart)["k"].inputs


def test_no_part_is_changed_and_nothing_adds_nothing():
    model, batches, options = CASES["padding"]
    stats = lr.calibrate(model, batches, Energy(), **options)
    before = stats["twice"].inputs.second.clone()
    assert_equal(lr.Statistics().merge(stats, lr.Statistics()), stats)
    assert lr.Statistics().merge().samples == 0
    stats.merge(stats)
    assert torch.equal(stats["twice"].inputs.second, before)


def test_refuses_what_does_not_add_up():
    wide, narrow = nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Linear(6, 5))
    two = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    batches = [torch.randn(4, 6)]
    stats = lr.calibrate(wide, batches, Energy())
    with pytest.raises(lr.LowRankError, match=r"different layers, of which '0' is in one part only"):
        lr.calibrate(two, batches, target=["0"]).merge(lr.calibrate(two, batches, target=["1"]))
    with pytest.raises(lr.LowRankError, match=r"gradients of the shapes \(8, 8\) and \(5, 5\) for the layer '0'"):
        stats.merge(lr.calibrate(narrow, batches, Energy()))
    with pytest.raises(lr.LowRankError, match=r"mean of the shapes \(6,\) and \(3,\)"):
        lr.calibrate(wide, batches).merge(lr.calibrate(nn.Sequential(nn.Linear(3, 8)), [torch.randn(4, 3)]))
    with pytest.raises(lr.LowRankError, match="under Energy with gradients and under SampledCrossEntropy with"):
        stats.merge(lr.calibrate(wide, batches, lr.SampledCrossEntropy()))
    with pytest.raises(lr.LowRankError, match="under Energy with gradients and under no loss"):
        stats.merge(lr.calibrate(wide, batches))
    with pytest.raises(lr.LowRankError, match="got stats of type dict, expected what calibrate returned"):
        stats.merge({})
    with pytest.raises(lr.LowRankError, match="0 samples"):
        stats.merge(dataclasses.replace(stats, samples=0))
    crossed = dataclasses.replace(stats["0"], cross=torch.eye(6), target_mean=torch.zeros(6))
    with pytest.raises(lr.LowRankError, match="moments between two models"):
        stats.merge(dataclasses.replace(stats, layers={"0": crossed}))
