"""Ranks under one limit of bytes, and subspaces from calibration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.kv_cache.budget import KEYS_COUNT

SIZE, HEADS, COUNT = 8, 2, 300


def layers(amount: int = 3, **changes: object) -> list[lr.LowRankKV]:
    """Layers whose keys and values have spectra that fall at different speeds."""
    settings = lr.KVSettings(**{"rank": 4, "keep_recent": 8, "keep_first": 2, "block": 16} | changes)
    found = []
    for index in range(amount):
        torch.manual_seed(index)
        decay = torch.tensor([0.95, 0.5])[:, None, None] ** (index + torch.arange(1.0, 1 + SIZE))
        cache = lr.LowRankKV(settings)
        cache.append(torch.randn(1, HEADS, COUNT, SIZE) * decay, torch.randn(1, HEADS, COUNT, SIZE) * decay.flip(0))
        found.append(cache)
    return found


def chosen(caches: list[lr.LowRankKV]) -> list[int]:
    return [rank for cache in caches for side in cache.ranks for rank in side]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("budget", [0.31, 0.33, 35_000])
def test_the_limit_is_kept_and_one_more_direction_would_exceed_it(joint, dtype, budget):
    caches = layers(joint=joint, dtype=dtype)
    exact = sum(cache.exact_nbytes() for cache in caches)
    widest = max(cache.direction_nbytes(HEADS * SIZE if joint else SIZE) for cache in caches)
    lr.compress_together(caches, budget)
    used, limit = sum(cache.nbytes() for cache in caches), budget if isinstance(budget, int) else int(budget * exact)
    assert limit - widest < used <= limit
    assert len(set(chosen(caches))) > 2
    query = torch.randn(1, 2 * HEADS, 1, SIZE)
    for cache in caches:
        keys, values = (x.repeat_interleave(2, 1) for x in cache.dense())
        expected = nn.functional.scaled_dot_product_attention(query, keys, values)
        torch.testing.assert_close(cache.attend(query), expected, atol=1e-5, rtol=1e-4)


def test_no_other_ranks_of_the_same_bytes_lose_less():
    caches = layers(1, joint=False)
    scatters = caches[0].scatters()
    lr.compress_together(caches, 0.5)
    energies = [e / e.sum() * w for s, w in zip(scatters, (KEYS_COUNT, 1.0), strict=True) for e in s.spectrum()[0][0]]

    def lost(ranks: tuple[int, ...]) -> float:
        return sum(float(energy[rank:].sum()) for energy, rank in zip(energies, ranks, strict=True))

    ranks = tuple(chosen(caches))
    every = itertools.product(range(1, SIZE + 1), repeat=4)
    best = min(lost(other) for other in every if sum(other) == sum(ranks))
    assert lost(ranks) == pytest.approx(best, rel=1e-6)


def test_what_does_not_fit_is_refused_and_nothing_is_compressed():
    caches = layers()
    with pytest.raises(lr.BudgetError, match="bytes are left"):
        lr.compress_together(caches, 0.01)
    assert all(cache.compressed == 0 for cache in caches)
    for budget in (0, 1.5, True, -3, "0.5"):
        with pytest.raises(lr.LowRankError, match="expected a part in"):
            lr.compress_together(caches, budget)
    caches[1].compress()
    with pytest.raises(lr.LowRankError, match="compressed already"):
        lr.compress_together(caches, 0.5)


def test_a_prompt_without_old_tokens_waits():
    cache = lr.LowRankKV(lr.KVSettings(rank=4))
    cache.append(torch.randn(1, HEADS, 20, SIZE), torch.randn(1, HEADS, 20, SIZE))
    lr.compress_together([cache], 0.5)
    assert cache.compressed == 0


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


def test_the_helper_for_plain_modules_goes_on_where_it_stopped():
    attention = lr.LowRankAttention(lr.KVSettings(rank=SIZE, keep_recent=8, block=16), lr.Rotation.of(SIZE))
    q, k, v = torch.randn(3, 1, HEADS, 120, SIZE)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    pieces = [(0, 100), *((i, i + 1) for i in range(100, 120))]
    out = torch.cat([attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in pieces], 2)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-4)
    assert attention.cache.compressed > 0
    attention.reset()
    assert len(attention.cache) == 0
