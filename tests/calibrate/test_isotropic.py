"""Statistics in which all outputs of some layers count the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.calibrate.sketch import diagonal_plus_low_rank


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Conv1d(12, 12, 1, groups=3), nn.Flatten(), nn.Linear(12, 5))


@pytest.fixture
def stats(model) -> lr.Statistics:
    model = nn.Sequential(model[0], model[1], nn.Unflatten(1, (12, 1)), *model[2:])
    return lr.calibrate(model, [torch.randn(40, 8)], lr.SampledCrossEntropy())


@pytest.mark.parametrize("read", [False, True])
def test_the_mean_of_the_diagonal_stays(stats, read, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    stats = lr.Statistics.load(tmp_path / "stats.safetensors") if read else stats
    found = stats.isotropic(["0", "3"])
    for name in ("0", "3"):
        before, after = stats[name].gradients, found[name].gradients
        assert after.shape == before.shape
        for own, new in zip(before.view(-1, *before.shape[-2:]), after.view(-1, *before.shape[-2:]), strict=True):
            size = len(own)
            assert torch.allclose(new, torch.eye(size, dtype=own.dtype) * own.trace() / size, rtol=1e-12, atol=0)
    assert torch.equal(found["5"].gradients, stats["5"].gradients)
    assert torch.equal(found["0"].inputs.second, stats["0"].inputs.second)


def test_of_a_sketch_the_diagonal_is_left():
    model = nn.Sequential(nn.Linear(4, 520), nn.Tanh(), nn.Linear(520, 3))
    stats = lr.calibrate(model, [torch.randn(40, 4)], lr.SampledCrossEntropy(), sketch_above=0)
    sketch, own = stats["0"].gradients, stats.isotropic(["0"])
    diagonal, factor = diagonal_plus_low_rank(own["0"].gradients)
    assert sketch.shape[1] < 520
    assert torch.allclose(diagonal, sketch[:, 0].mean().expand(520), rtol=1e-12)
    assert not factor.any()
    lr.factorize_(model, lr.make_plan(model, rank=2, stats=own), stats=own)


def test_layers_are_built_as_without_gradients(model):
    """A multiple of the identity weights no output over another."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))
    x = torch.randn(40, 8)
    stats = lr.calibrate(model, [x], lr.SampledCrossEntropy()).isotropic(["0", "2"])
    plain = lr.calibrate(model, [x])
    one, other = (
        lr.factorize_(copy.deepcopy(model), lr.make_plan(model, rank=3, stats=s), stats=s) for s in (stats, plain)
    )
    for place in (0, 2):
        assert torch.allclose(one[place].weight, other[place].weight, atol=1e-6)


def test_names_that_match_nothing_are_refused(stats, model):
    with pytest.raises(lr.LowRankError, match="'q_proj' matches no layer"):
        stats.isotropic(["q_proj"])
    with pytest.raises(lr.LowRankError, match=r"write \['0'\]"):
        stats.isotropic("0")
    with pytest.raises(lr.LowRankError, match="calibrate with a loss"):
        lr.calibrate(nn.Sequential(model[0]), [torch.randn(4, 8)]).isotropic(["0"])
