"""Half precision and autocast: keys and values as SDPA takes them, and no sum of theirs that overflows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache

import lowrank_layers as lr

from .transformers.tiny_models import tiny
from .transformers.tiny_seq2seq import seq2seq, source

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(2))
KEEP = {"keep_recent": 6, "keep_first": 2, "block": 4}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
BOTH = pytest.mark.parametrize("implementation", ["lowrank", "plain"])


def steps(net, cache, ids=IDS, **inputs):
    """Logits of a prompt, of single tokens and of several."""
    name = "decoder_input_ids" if inputs else "input_ids"
    with torch.no_grad():
        parts = [
            net(**inputs, **{name: part}, past_key_values=cache).logits.float()
            for part in ids.split([40, 1, 1, 1, 9, 8], 1)
        ]
    return torch.cat(parts, 1)


def apart(a, b):
    return float((a - b).norm() / b.norm())


@HALVES
@BOTH
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "cohere", "opt", "deepseek_v3"])
def test_autocast(kind, implementation, dtype):
    lr.LowRankCache  # noqa: B018 - transformers knows the implementation from here on
    net, plain = tiny(kind), "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    net.set_attn_implementation(plain)
    exact = steps(net, DynamicCache())
    with torch.autocast("cpu", dtype):
        theirs = steps(net, DynamicCache())
        net.set_attn_implementation(implementation if implementation == "lowrank" else plain)
        # until 5.14 transformers caches expanded values of 12 entries for an MLA layer
        cache = lr.LowRankCache(16, value_rank=12 if kind == "deepseek_v3" else None, **KEEP)
        ours = steps(net, cache)
        own = [(layer.keys, layer.values) for layer in cache.layers]
    # both are as far from the exact logits as half precision puts them
    assert apart(ours, exact) < 1.5 * apart(theirs, exact) + 1e-3
    if kind == "llama":
        assert cache.layers[0].compressed > 40
        assert [layer.keys.dtype for layer in cache.layers] == [torch.float32] * 2
        assert [layer.values.dtype for layer in cache.layers] == [dtype] * 2
        # the moments, the bases and what they rebuild know nothing of autocast
        again = DynamicCache()
        with torch.autocast("cpu", dtype):
            steps(net, again)
        layer = again.layers[0]
        assert apart(own[0][0], layer.keys) < 1e-5


@HALVES
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_autocast_in_encoder_decoders(kind, dtype):
    lr.LowRankCache  # noqa: B018
    net, inputs = seq2seq(kind), source(kind)
    net.set_attn_implementation("eager")
    exact = steps(net, EncoderDecoderCache(DynamicCache(), DynamicCache()), **inputs)
    with torch.autocast("cpu", dtype):
        theirs = steps(net, EncoderDecoderCache(DynamicCache(), DynamicCache()), **inputs)
        net.set_attn_implementation("lowrank")
        ours = steps(net, EncoderDecoderCache(lr.LowRankCache(16, **KEEP), lr.LowRankCache(16, **KEEP)), **inputs)
    assert apart(ours, exact) < 1.5 * apart(theirs, exact) + 1e-3


@HALVES
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


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("stored", [None, torch.int8])
def test_keys_and_values_of_their_own_dtypes(dtypes, stored, tmp_path):
    keys, values = (torch.randn(1, 2, 200, 16).to(dtype) for dtype in dtypes)
    cache = lr.LowRankCache(16, dtype=stored, **KEEP)
    cache.update(keys, values, 0)
    assert cache.layers[0].compressed > 0
    cache.save(tmp_path / "cache.safetensors")
    for each in (cache, lr.LowRankCache.load(tmp_path / "cache.safetensors")):
        found = each.layers[0].keys, each.layers[0].values
        assert tuple(x.dtype for x in found) == dtypes
        for x, exact in zip(found, (keys, values), strict=True):
            assert apart(x.float(), exact.float()) < 0.02
    grown = cache.layers[0].kv
    with pytest.raises(lr.LowRankError, match="belongs to one model"):
        grown.append(values[:, :, :1], keys[:, :, :1])


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


@HALVES
@pytest.mark.parametrize("kind", ["llama", "gemma3", "deepseek_v3"])
def test_autocast_over_factorized_and_absorbed_attentions(kind, dtype):
    net, found = tiny(kind), {}
    if kind == "deepseek_v3" and not hasattr(net.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this version of transformers caches expanded keys and values")
    exact = steps(net, DynamicCache())
    for name in ("theirs", "ours"):
        if name == "ours":
            lr.absorb_mla_(net) if kind == "deepseek_v3" else lr.factorize_kv_(net, rank=16)
        with torch.autocast("cpu", dtype):
            found[name] = steps(net, DynamicCache())
    assert apart(found["ours"], exact) < 1.5 * apart(found["theirs"], exact) + 1e-3
