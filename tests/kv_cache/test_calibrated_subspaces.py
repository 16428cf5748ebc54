"""Subspaces from calibration: those of the calibrated tokens, one for every sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

SIZE, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(12, HEADS * SIZE), nn.Linear(12, HEADS * SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.k_proj(x) + self.v_proj(x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (p(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return keys.detach(), values.detach()


@pytest.mark.parametrize("joint", [True, False])
def test_subspaces_from_calibration_are_those_of_the_calibrated_tokens(joint):
    model, x = Attention(), torch.randn(1, 400, 12) @ torch.randn(12, 12)
    settings = lr.KVSettings(rank=3, joint=joint, keep_recent=0, keep_first=0)
    (pair,) = lr.kv_subspaces(model, lr.calibrate(model, [x[0]]), settings, head_size=SIZE)
    rotation = lr.Rotation.of(SIZE)
    fitted, fixed = lr.LowRankKV(settings, rotation), lr.LowRankKV(settings, rotation, pair)
    keys, values = model.heads(x)
    for cache in (fitted, fixed):
        cache.append(rotation.turn(keys, torch.arange(400)), values)
        cache.compress()
    for offline, own in zip(fixed.dense(), fitted.dense(), strict=True):
        torch.testing.assert_close(offline, own, atol=1e-3, rtol=1e-3)
    assert pair[0].basis.shape == ((1, 1, 16, 6) if joint else (1, 2, 8, 3))


def test_one_basis_serves_a_batch_and_its_rows():
    model, x = Attention(), torch.randn(3, 100, 12)
    settings = lr.KVSettings(rank=3, keep_recent=8, refresh=None)
    (pair,) = lr.kv_subspaces(model, lr.calibrate(model, [x[0]]), settings, head_size=SIZE)
    cache = lr.LowRankKV(settings, None, pair)
    cache.append(*model.heads(x))
    cache.compress()
    before = cache.dense()
    cache.select(torch.tensor([2, 2, 0, 1]))
    assert all(torch.equal(a, b[[2, 2, 0, 1]]) for a, b in zip(cache.dense(), before, strict=True))
    assert cache.old[0].parts[0].subspace.basis.shape[0] == 1


def test_what_calibration_cannot_know_is_refused():
    model = Attention()
    stats = lr.calibrate(model, [torch.randn(50, 12)])
    with pytest.raises(lr.LowRankError, match="knows no positions"):
        lr.kv_subspaces(model, stats, lr.KVSettings(rope="after"), head_size=SIZE)
    with pytest.raises(lr.LowRankError, match="no multiple"):
        lr.kv_subspaces(model, stats, lr.KVSettings(rank=2), head_size=5)
    with pytest.raises(lr.LowRankError, match="give their names"):
        lr.kv_subspaces(model, stats, lr.KVSettings(rank=2), head_size=SIZE, keys="key")
    other = nn.Sequential(Attention())
    with pytest.raises(lr.LowRankError, match="was not calibrated"):
        lr.kv_subspaces(other, stats, lr.KVSettings(rank=2), head_size=SIZE)
