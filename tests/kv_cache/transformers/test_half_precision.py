"""Models under autocast with LowRankCache, factorized and absorbed attentions: as far off as the models themselves."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import lowrank_layers as lr

from .caches import KEEP, WARNINGS
from .tiny_models import peaked
from .tiny_seq2seq import seq2seq, source

pytestmark = WARNINGS
IDS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(2))
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
    net, plain = peaked(kind), "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
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
    net, inputs = seq2seq(kind), source(kind)
    net.set_attn_implementation("eager")
    exact = steps(net, EncoderDecoderCache(DynamicCache(), DynamicCache()), **inputs)
    with torch.autocast("cpu", dtype):
        theirs = steps(net, EncoderDecoderCache(DynamicCache(), DynamicCache()), **inputs)
        net.set_attn_implementation("lowrank")
        ours = steps(net, EncoderDecoderCache(lr.LowRankCache(16, **KEEP), lr.LowRankCache(16, **KEEP)), **inputs)
    assert apart(ours, exact) < 1.5 * apart(theirs, exact) + 1e-3


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


@HALVES
@pytest.mark.parametrize("kind", ["llama", "gemma3", "deepseek_v3"])
def test_autocast_over_factorized_and_absorbed_attentions(kind, dtype):
    net, found = peaked(kind), {}
    if kind == "deepseek_v3" and not hasattr(net.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this version of transformers caches expanded keys and values")
    exact = steps(net, DynamicCache())
    for name in ("theirs", "ours"):
        if name == "ours":
            lr.absorb_mla_(net) if kind == "deepseek_v3" else lr.factorize_kv_(net, rank=16)
        with torch.autocast("cpu", dtype):
            found[name] = steps(net, DynamicCache())
    assert apart(found["ours"], exact) < 1.5 * apart(found["theirs"], exact) + 1e-3
