"""Ranks under one limit of bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.kv_cache.budget import KEY_ERROR_WEIGHT

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
    return [rank for cache in caches for side in cache.fits.ranks for rank in side]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("budget", [0.31, 0.33, 35_000])
def test_the_limit_is_kept_and_one_more_direction_would_exceed_it(joint, dtype, budget):
    caches = layers(joint=joint, dtype=dtype)
    exact = len(caches) * 2 * COUNT * HEADS * SIZE * 4
    # one more direction: a coefficient per old token, and a column of a basis, which int8 has in bfloat16
    widest = (COUNT - 8 - 2) * dtype.itemsize + (HEADS * SIZE if joint else SIZE) * (2 if dtype == torch.int8 else 4)
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
    old = [side[0, :, 2:-8] for side in caches[0].dense()]
    energies = [
        energy / energy.sum() * weight
        for side, weight in zip(old, (KEY_ERROR_WEIGHT, 1.0), strict=True)
        for energy in torch.linalg.svdvals(side - side.mean(1, keepdim=True)).square()
    ]
    lr.compress_together(caches, 0.5)

    def lost(ranks: tuple[int, ...]) -> float:
        return sum(float(energy[rank:].sum()) for energy, rank in zip(energies, ranks, strict=True))

    ranks = tuple(chosen(caches))
    every = itertools.product(range(1, SIZE + 1), repeat=4)
    best = min(lost(other) for other in every if sum(other) == sum(ranks))
    assert lost(ranks) == pytest.approx(best, rel=1e-4)


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
