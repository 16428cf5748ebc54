"""Long rows of inputs are scaled down before their moments are taken, and where layers are fitted to them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate.moments import Moments
from lowrank_layers.compress.build import build_layer

CLIP = 2.0


def rows(count: int = 21, width: int = 6) -> Tensor:
    """Rows of which some are many times as long as the others."""
    x = torch.randn(count, width)
    x[::5] *= 50
    return x


def scale(x: Tensor, clip: float = CLIP) -> Tensor:
    """What each row is multiplied by, ``[count, 1]``."""
    norms = x.double().norm(dim=1)
    return (clip * norms.sort().values[(len(x) - 1) // 2] / norms).clamp(max=1)[:, None]


def check_moments(found: Moments, *calls: Tensor) -> None:
    x = torch.cat([call.double() * scale(call) for call in calls])
    assert found.rows == len(x)
    assert torch.allclose(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.second, x.mT @ x / len(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("staged", [False, True])
def test_rows_of_each_call_are_clipped_at_its_own_median(staged, tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    batches = [rows(), 1000 * rows(32)]
    settings = {"folder": tmp_path / "stats"} if staged else {}
    stats = lr.calibrate(model, batches, lr.SampledCrossEntropy(), clip=CLIP, **settings)
    check_moments(stats["0"].inputs, *batches)
    check_moments(stats["2"].inputs, *(model[:2](x).detach() for x in batches))
    plain = lr.calibrate(model, batches, lr.SampledCrossEntropy())
    assert torch.allclose(stats["2"].gradients, plain["2"].gradients, rtol=1e-12)


def test_padding_has_no_part_in_the_median():
    layer, x = nn.Linear(6, 4), torch.stack([rows(), rows()])
    real = torch.arange(21) < torch.tensor([[21], [6]])
    wide = x.masked_fill(~real[..., None], 1e6)
    stats = lr.calibrate(nn.Sequential(layer), [wide], mask=lambda _: real, clip=CLIP)
    check_moments(stats["0"].inputs, x[real])


def test_rows_among_mostly_zeros_and_rows_of_nothing_stay():
    model = nn.Sequential(nn.Linear(6, 4))
    x = rows(9) * (torch.arange(9) > 5)[:, None]
    stats = lr.calibrate(model, [x, x[:0]], clip=CLIP)
    assert torch.allclose(stats["0"].inputs.second, (x.mT @ x / 9).double(), rtol=1e-5)


def test_convolutions_and_embeddings_see_their_inputs_as_they_are():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Conv1d(12, 4, 3))
    ids = torch.randint(10, (5, 12))
    clipped, plain = (lr.calibrate(model, [ids], clip=clip) for clip in (1, None))
    for name in ("0", "1"):
        assert torch.equal(clipped[name].inputs.second, plain[name].inputs.second)


def test_layers_are_fitted_in_sequence_to_rows_that_are_scaled_likewise():
    """With enough rows that the plain regression is chosen."""
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    x = rows(4096)
    stats = lr.calibrate(dense, [x], clip=1)
    plan = lr.make_plan(dense, rank=2, stats=stats)
    built = lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=[x])

    before, behind = (net[:2](x).detach().double() for net in (dense, built))
    factor = scale(before, clip=1)
    assert int((factor < 0.99).sum()) > 10
    before, behind = before * factor, behind * factor
    means = before.mean(0), behind.mean(0)
    inputs = Moments(means[1], behind.mT @ behind / len(x), len(x))
    cross = before.mT @ behind / len(x) - torch.outer(*means)
    known = stats["2"].changed(inputs=inputs, cross=cross, target_mean=means[0])
    expected = build_layer(dense[2], plan["2"], known, plan.damping)
    assert torch.allclose(built[2].weight, expected.weight, atol=1e-4)
    assert torch.allclose(built[2].bias, expected.bias, atol=1e-4)


def test_a_file_keeps_it_and_parts_of_one_have_to_agree(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 4)), rows()
    stats = lr.calibrate(model, [x], clip=CLIP)
    stats.save(tmp_path / "stats.safetensors")
    assert lr.Statistics.load(tmp_path / "stats.safetensors").clip == CLIP
    assert stats.merge(stats).clip == CLIP
    with pytest.raises(lr.LowRankError, match=r"clip=2\.0 and None"):
        stats.merge(lr.calibrate(model, [x]))


@pytest.mark.parametrize("clip", [0.5, -1, math.inf, math.nan, True, "much"])
def test_what_is_no_limit_is_refused(clip):
    with pytest.raises(lr.LowRankError, match="at least 1"):
        lr.calibrate(nn.Linear(6, 4), [rows()], clip=clip)
