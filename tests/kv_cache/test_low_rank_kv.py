"""The cache of one layer against plain attention over all keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers.kv_cache import attend as attend_module

SIZE, HEADS = 16, 4
ROTATIONS = {
    "none": None,
    "half": lr.Rotation.of(SIZE),
    "interleaved": lr.Rotation.of(SIZE, interleaved=True),
    "partial": lr.Rotation.of(8, start=4),
}
STEPS = (100, 1, 1, 30, 1, 7, 1, 40, 1)


def settings(**changes: object) -> lr.KVSettings:
    return lr.KVSettings(**{"rank": 4, "keep_recent": 8, "keep_first": 3, "block": 16} | changes)


def tokens(count: int, *, batch: int = 2, rank: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random keys and values; with a rank, each head's lie in that many directions about a mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, HEADS, count, SIZE)
    if rank is None:
        x = torch.randn(shape, generator=generator)
    else:
        inner = torch.randn(2, batch, HEADS, count, rank, generator=generator)
        x = inner @ torch.randn(2, 1, HEADS, rank, SIZE, generator=generator)
        x = x + torch.randn(2, 1, HEADS, 1, SIZE, generator=generator)
    return x[0], x[1]


def filled(cache: lr.LowRankKV, count: int = 200, **how: object) -> tuple[Tensor, Tensor]:
    keys, values = tokens(count, **how)
    if cache.rotation is not None:
        keys = cache.rotation.turn(keys, torch.arange(count))
    cache.append(keys, values)
    cache.compress()
    return keys, values


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("joint", [True, False])
def test_at_full_rank_it_is_plain_attention(joint, rotation, rope):
    cache = lr.LowRankKV(settings(rank=SIZE, joint=joint, rope=rope), ROTATIONS[rotation])
    every_key, every_value = tokens(sum(STEPS))
    done = 0
    for count in STEPS:
        cache.append(*(x[:, :, done : done + count] for x in (every_key, every_value)))
        done += count
        query = torch.randn(2, 3 * HEADS, count, SIZE)
        expected = plain(query, every_key[:, :, :done], every_value[:, :, :done])
        torch.testing.assert_close(cache.attend(query), expected, atol=2e-5, rtol=1e-4)
        cache.compress()
        keys, values = cache.dense()
        torch.testing.assert_close(keys, every_key[:, :, :done], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(values, every_value[:, :, :done], atol=2e-5, rtol=1e-4)
    assert len(cache) == done
    assert cache.compressed == done - 3 - 8 - (cache.recent[0].tokens - 8)
    assert cache.recent[0].tokens < 8 + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("rank", [3, lr.Energy(0.7)])
@pytest.mark.parametrize("joint", [True, False])
def test_attention_in_the_subspace_is_attention_over_the_rebuilt_tokens(joint, rank, rope, dtype):
    cache = lr.LowRankKV(settings(rank=rank, joint=joint, rope=rope, dtype=dtype), ROTATIONS["half"])
    decay = torch.tensor([1.0, 0.9, 0.9, 0.7])[:, None, None] ** torch.arange(SIZE)  # heads of different ranks
    keys, values = (x * decay for x in tokens(200))
    cache.append(keys, values)
    cache.compress()
    if not joint and rank != 3:
        assert len(cache.old[1].parts) > 1
    dense = cache.dense()
    query = torch.randn(2, 2 * HEADS, 5, SIZE)
    torch.testing.assert_close(cache.attend(query), plain(query, *dense), atol=1e-5, rtol=1e-4)
    for rebuilt, exact in zip(dense, (keys, values), strict=True):
        assert torch.equal(rebuilt[:, :, :3], exact[:, :, :3])
        assert torch.equal(rebuilt[:, :, -8:], exact[:, :, -8:])
        assert not torch.allclose(rebuilt[:, :, 3:-8], exact[:, :, 3:-8], atol=1e-2)


def test_long_caches_go_tile_by_tile():
    cache = lr.LowRankKV(settings(), ROTATIONS["half"])
    filled(cache, 1000, batch=1)
    query = torch.randn(1, HEADS, 2, SIZE)
    torch.testing.assert_close(cache.attend(query), plain(query, *cache.dense()), atol=1e-5, rtol=1e-4)


def test_long_runs_of_queries_go_in_turns(monkeypatch):
    cache = lr.LowRankKV(settings(), ROTATIONS["half"])
    filled(cache)
    query = torch.randn(2, 2 * HEADS, 33, SIZE)
    whole = cache.attend(query)
    monkeypatch.setattr(attend_module, "MOST_SCORES", 2 * 2 * HEADS * 200 * 7)
    torch.testing.assert_close(cache.attend(query), whole)


@pytest.mark.parametrize("kind", ["bool", "float", "a head"])
@pytest.mark.parametrize("compressed", [True, False])
def test_masks(compressed, kind):
    cache = lr.LowRankKV(settings(keep_recent=8 if compressed else 300), ROTATIONS["half"])
    filled(cache)
    assert (cache.compressed > 0) == compressed
    query = torch.randn(2, 2 * HEADS, 3, SIZE)
    mask = torch.rand(2, 2 * HEADS if kind == "a head" else 1, 3, 200) < 0.5
    if kind == "float":
        mask = torch.randn(mask.shape)
    out = cache.attend(query, mask=mask, scale=0.3)
    torch.testing.assert_close(out, plain(query, *cache.dense(), mask, 0.3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compressed", [True, False])
def test_softcap_and_sinks(compressed):
    cache = lr.LowRankKV(settings(keep_recent=8 if compressed else 300))
    filled(cache)
    query, sinks = torch.randn(2, 2 * HEADS, 1, SIZE), torch.randn(2 * HEADS)
    keys, values = (x.repeat_interleave(2, 1) for x in cache.dense())
    scores = 5 * torch.tanh(query @ keys.mT * SIZE**-0.5 / 5)
    weights = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(2, -1, 1, 1)], -1).softmax(-1)[..., :-1]
    out = cache.attend(query, softcap=5.0, sinks=sinks)
    torch.testing.assert_close(out, weights @ values, atol=1e-5, rtol=1e-4)


def test_the_first_fit_loses_the_tail_of_the_spectrum():
    cache = lr.LowRankKV(settings(joint=False, keep_first=0))
    _, values = filled(cache)
    old = values[:, :, :-8]
    lost = (cache.dense()[1][:, :, :-8] - old).square().sum((2, 3))
    centred = old - old.mean(2, keepdim=True)
    torch.testing.assert_close(lost, torch.linalg.svdvals(centred)[..., 4:].square().sum(-1), rtol=1e-4, atol=1e-4)


def test_keys_that_are_low_rank_before_rope_are_not_after():
    caches = {rope: lr.LowRankKV(settings(rope=rope, joint=False), ROTATIONS["half"]) for rope in ("before", "after")}
    keys, values = tokens(200, rank=4)
    keys = ROTATIONS["half"].turn(keys, torch.arange(200))
    for cache in caches.values():
        cache.append(keys, values)
        cache.compress()
    torch.testing.assert_close(caches["before"].dense()[0], keys, atol=1e-4, rtol=1e-4)
    error = torch.linalg.vector_norm(caches["after"].dense()[0] - keys) / torch.linalg.vector_norm(keys)
    assert error > 0.1


def test_a_row_with_padding_on_the_left_keeps_its_rank():
    """Its tokens sit at other indices than positions: that is one constant rotation of its keys."""
    cache = lr.LowRankKV(settings(joint=False), ROTATIONS["half"])
    keys, values = tokens(200, rank=4)
    keys = ROTATIONS["half"].turn(keys, torch.arange(200) - 17)
    cache.append(keys, values)
    cache.compress()
    torch.testing.assert_close(cache.dense()[0], keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("joint", [True, False])
def test_bytes_are_those_of_the_formula(joint, dtype):
    cache = lr.LowRankKV(settings(joint=joint, dtype=dtype))
    filled(cache)
    groups, width, rank = (1, HEADS * SIZE, 4 * HEADS) if joint else (HEADS, SIZE, 4)
    old, item, basis = 200 - 3 - 8, dtype.itemsize, 2 if dtype == torch.int8 else 4
    side = groups * (rank * old * item + width * rank * basis + width * basis)
    side += groups * old * 2 if dtype == torch.int8 else 0
    exact = (3 + 8 + 16) * HEADS * SIZE * 4
    assert cache.nbytes() == 2 * 2 * (side + exact)


@pytest.mark.parametrize("length", [195, 150, 3, 2, 0])
def test_crop_leaves_the_first_tokens(length):
    cache = lr.LowRankKV(settings(), ROTATIONS["half"])
    filled(cache)
    before = cache.dense()
    cache.crop(length)
    assert len(cache) == length
    if length:
        for left, whole in zip(cache.dense(), before, strict=True):
            torch.testing.assert_close(left, whole[:, :, :length], atol=1e-6, rtol=1e-6)
        keys, values = tokens(40, seed=1)
        cache.append(keys, values)
        cache.compress()
        assert torch.equal(cache.dense()[1][:, :, -8:], values[:, :, -8:])
    else:
        assert cache.nbytes() == 0


def test_rows_are_selected_and_repeated():
    cache = lr.LowRankKV(settings(dtype=torch.int8), ROTATIONS["half"])
    filled(cache)
    keys, values = cache.dense()
    cache.repeat(2)
    index = torch.tensor([3, 0, 2])
    cache.select(index)
    for got, whole in zip(cache.dense(), (keys, values), strict=True):
        assert torch.equal(got, whole.repeat_interleave(2, 0)[index])


def test_a_copy_goes_its_own_way():
    cache = lr.LowRankKV(settings(), ROTATIONS["half"])
    filled(cache)
    other = copy.deepcopy(cache)
    before = cache.dense()
    other.append(*tokens(50, seed=1))
    other.compress()
    assert len(cache) == 200
    assert all(torch.equal(a, b) for a, b in zip(cache.dense(), before, strict=True))


@pytest.mark.parametrize("joint", [True, False])
def test_the_subspace_follows_when_the_tokens_change(joint):
    errors = {}
    for refresh in (None, 2.0):
        cache = lr.LowRankKV(settings(rank=5, refresh=refresh, joint=joint, keep_first=0))
        filled(cache, 200, rank=2)
        before = cache.dense()[1][:, :, :150]
        keys, values = tokens(64, rank=2, seed=9)  # other directions
        cache.append(keys, values)
        cache.compress()
        rebuilt = cache.dense()[1]
        errors[refresh] = float((rebuilt[:, :, 200:256] - values[:, :, :56]).norm() / values[:, :, :56].norm())
        torch.testing.assert_close(rebuilt[:, :, :150], before, atol=2e-3, rtol=1e-3)
    assert errors[2.0] < 1e-3 < 0.1 < errors[None]


def test_short_prompts_stay_exact_until_there_is_a_block():
    cache = lr.LowRankKV(settings())
    keys, values = filled(cache, 3 + 8 + 15)
    assert cache.compressed == 0
    assert torch.equal(cache.dense()[0], keys)
    cache.append(*(x[:, :, :1] for x in (keys, values)))
    cache.compress()
    assert cache.compressed == 16


def bad(keys: Tensor, values: Tensor) -> dict[str, tuple[Tensor, Tensor, str]]:
    return {
        "no tokens": (keys[:, :, :0], values[:, :, :0], "empty"),
        "NaN": (keys * float("nan"), values, "NaN"),
        "Inf": (keys, values / 0, "NaN or Inf"),
        "heads": (keys[:, :2], values[:, :2], "belongs to one model"),
        "size": (keys[..., :8], values[..., :8], "belongs to one model"),
        "batch": (keys[:1], values[:1], "belongs to one model"),
        "dtype": (keys.double(), values.double(), "belongs to one model"),
        "mixed dtypes": (keys.double(), values, "belongs to one model"),
        "whole numbers": (keys.int(), values.int(), "floating point"),
        "device": (keys.to("meta"), values.to("meta"), "belongs to one model"),
        "unlike": (keys, values[:, :, :1], "same batch, heads and tokens"),
        "dimensions": (keys[0], values[0], "batch, heads, tokens, size"),
        "too many": (keys.repeat(1, 1, 60, 1), values.repeat(1, 1, 60, 1), "max_length=300"),
    }


@pytest.mark.parametrize("case", bad(*tokens(2)))
def test_bad_tokens_are_refused_and_change_nothing(case):
    cache = lr.LowRankKV(settings(max_length=300))
    filled(cache)
    before, size = cache.dense(), cache.nbytes()
    keys, values, message = bad(*tokens(2))[case]
    with pytest.raises(lr.LowRankError, match=message):
        cache.append(keys, values)
    assert len(cache) == 200
    assert cache.nbytes() == size
    assert all(torch.equal(a, b) for a, b in zip(cache.dense(), before, strict=True))


def test_a_rank_above_the_head_and_an_empty_cache_are_refused():
    cache = lr.LowRankKV(settings(rank=SIZE + 1))
    with pytest.raises(lr.LowRankError, match="rank 17 for keys of 16"):
        cache.append(*tokens(5))
    with pytest.raises(lr.LowRankError, match="rank 20 for values"):
        lr.LowRankKV(settings(value_rank=20)).append(*tokens(5))
    with pytest.raises(lr.LowRankError, match="empty"):
        cache.attend(torch.randn(1, 4, 1, SIZE))
    with pytest.raises(lr.LowRankError, match="even number"):
        lr.Rotation.of(7)


def test_a_mask_of_another_length_is_refused():
    cache = lr.LowRankKV(settings())
    filled(cache)
    with pytest.raises(lr.LowRankError, match="mask for 10 tokens"):
        cache.attend(torch.randn(2, HEADS, 1, SIZE), mask=torch.ones(2, 1, 1, 10, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    cache = lr.LowRankKV(settings(rank=SIZE), ROTATIONS["half"])
    keys, values = (x.to(dtype) for x in tokens(200))
    cache.append(keys, values)
    cache.compress()
    query = torch.randn(2, HEADS, 1, SIZE).to(dtype)
    out = cache.attend(query)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), plain(query.float(), keys.float(), values.float()), atol=2e-2, rtol=2e-2)
