"""Half precision and autocast: keys and values as SDPA takes them, and no sum of theirs that overflows."""

import pytest
import torch
import torch.nn.functional as F

import lowrank_layers as lr

from .packed import OFFSET, ROTATIONS, SIZE, exact_scores, group_of, score_terms

KEEP = {"keep_recent": 6, "keep_first": 2, "block": 4}


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_under_autocast_is_torchs(dtype):
    q, k, v = torch.randn(3, 2, 2, 50, 16)
    attention = lr.LowRankAttention(lr.KVSettings(rank=16, **KEEP))
    with torch.autocast("cpu", dtype):
        first = attention(q[:, :, :49], k[:, :, :49], v[:, :, :49])
        expected = F.scaled_dot_product_attention(q[:, :, :49], k[:, :, :49], v[:, :, :49], is_causal=True)
        assert torch.equal(first, expected)
        last = attention(q[:, :, 49:], k[:, :, 49:], v[:, :, 49:])
        theirs = F.scaled_dot_product_attention(q[:, :, 49:], k, v)
    assert (first.dtype, last.dtype) == (dtype, dtype) == (expected.dtype, theirs.dtype)
    assert apart(last.float(), theirs.float()) < 4 * torch.finfo(dtype).eps
    assert apart(attention.cache.dense()[0], k) < 1e-5
    double = lr.LowRankAttention(lr.KVSettings(rank=16, **KEEP))
    with torch.autocast("cpu", dtype):
        assert double(q.double(), k.double(), v.double()).dtype == torch.float64


def test_a_budget_counts_each_side_in_its_dtype():
    keys, values = torch.randn(1, 2, 400, 16), torch.randn(1, 2, 400, 16).bfloat16()
    layers = [lr.LowRankKV(lr.KVSettings(keep_recent=16, block=16)) for _ in range(2)]
    for layer in layers:
        layer.append(keys, values)
    lr.compress_together(layers, 0.5)
    exact = 2 * (keys.nbytes + values.nbytes)
    assert 0.45 * exact < sum(layer.nbytes() for layer in layers) <= 0.5 * exact


FINITE = {
    "a sum beyond fp16": torch.full((1, 2, 600, 16), 300.0, dtype=torch.float16),
    "the largest in fp16": torch.full((1, 2, 600, 16), 65504.0, dtype=torch.float16),
    "the largest in bf16": torch.full((1, 2, 20, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
    "the largest in fp32": torch.full((1, 2, 20, 16), torch.finfo(torch.float32).max),
    "both signs": torch.tensor([65504.0, -65504.0], dtype=torch.float16).repeat(1, 2, 20, 8),
}


@pytest.mark.parametrize("name", FINITE)
def test_finite_keys_and_values_are_taken(name):
    x = FINITE[name]
    cache = lr.LowRankKV(lr.KVSettings(rank=8, keep_recent=1000))
    cache.append(x, x)
    assert len(cache) == x.shape[2]
    assert all(torch.equal(found, x) for found in cache.dense())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", [0, 1])
def test_one_number_that_is_not_finite_is_found(bad, dtype, side):
    both = [torch.zeros(1, 2, 30, 16, dtype=dtype) for _ in range(2)]
    both[side][0, 1, 17, 3] = bad
    cache = lr.LowRankKV(lr.KVSettings(rank=8))
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        cache.append(*both)
    assert len(cache) == 0


@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("refresh", [None, 1.0])
def test_coefficients_of_finite_keys_are_finite(stored, refresh):
    """Eight heads' entries of 20,000 that rise and fall together have a norm of 450,000: far beyond fp16."""
    along = torch.linspace(-1, 1, 300)[None, None, :, None]
    keys = (20_000 * along + torch.randn(1, 8, 300, 64)).half()
    cache = lr.LowRankKV(lr.KVSettings(rank=4, keep_recent=8, block=32, dtype=stored, refresh=refresh))
    for part in keys.split(100, 2):
        cache.append(part, part)
        cache.compress()
    assert cache.compressed > 250
    assert apart(cache.dense()[0].float(), keys.float()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_keys_in_the_frames_of_their_tiles(dtype):
    rotation = ROTATIONS["halves"]
    group = group_of(1, 1, 1, 2, 77, (3, 6, 8, 8, 16), rotation)
    rows = torch.randn(1, 2, 3, SIZE, dtype=dtype)
    found = group.tile_scores(rows, rotation.tile_waves(OFFSET, 77))
    assert found.dtype == dtype
    # turned rows, those by directions, levels' middles that are taken off, gains, shifts and sums are rounded
    bound = 8 * torch.finfo(dtype).eps * score_terms(group, rows)
    assert ((found - exact_scores(group, rows, rotation)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weighted_sums_over_levels_are_as_exact_as_over_values(dtype):
    tokens = 2000
    group = group_of(1, 1, 1, 2, tokens, (16, 0, 0, 0, 0), None)
    weights, values = torch.randn(1, 2, 3, tokens).softmax(-1).to(dtype), group.rebuilt(0, tokens, torch.float64)
    exact = weights.double() @ values
    # bases and coefficients are rounded in place of values
    assert apart(group.mixed(weights), exact) <= 3 * apart(weights @ values.to(dtype), exact)
