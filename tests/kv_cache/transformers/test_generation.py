"""Generation with LowRankCache: at full rank DynamicCache's very tokens, in every way of decoding."""

import pytest
import torch
from transformers import DynamicCache

from .caches import IDS, IMPLEMENTATIONS, WARNINGS, compressed, exact
from .tiny_models import ROTATIONS, tiny

pytestmark = WARNINGS
ONE = IDS[:1]


@pytest.fixture(scope="module")
def llamas():
    return {name: tiny("llama", name) for name in ("lowrank", "sdpa")}


def same(net, ids=ONE, cache=None, tokens=12, **options):
    cache = exact() if cache is None else cache
    torch.manual_seed(5)
    ours = net.generate(ids, past_key_values=cache, max_new_tokens=tokens, **{"do_sample": False, **options})
    torch.manual_seed(5)
    theirs = net.generate(ids, past_key_values=DynamicCache(), max_new_tokens=tokens, **{"do_sample": False, **options})
    assert torch.equal(ours, theirs)
    assert compressed(cache)
    return cache


@pytest.mark.parametrize("configured", [False, True])
@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ROTATIONS)
def test_every_architecture_generates_the_same_tokens(kind, implementation, configured):
    eager = kind in ("gpt_oss", "gemma2", "gptj")
    net = tiny(kind, "eager" if eager and implementation == "sdpa" else implementation)
    # until 5.14 transformers caches expanded values of 12 entries for an MLA layer
    cache = exact(config=net.config if configured else None, value_rank=12 if kind.startswith("deepseek") else None)
    ours = net.generate(IDS, past_key_values=cache, max_new_tokens=12, do_sample=False)
    net.set_attn_implementation("eager" if eager else "sdpa")
    assert torch.equal(ours, net.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=12, do_sample=False))
    latent = kind.startswith("deepseek") and hasattr(net.model.layers[0].self_attn, "expand_kv")
    windows = configured and "sliding_attention" in (getattr(net.config, "layer_types", None) or ())
    if latent or (configured and kind == "mistral"):
        assert not compressed(cache)
        return
    assert compressed(cache)
    assert not windows or not isinstance(cache.layers[0], type(cache.layers[1]))
    rotation = cache.layers[1].kv.rotation
    found = None if rotation is None else (len(rotation.frequencies), rotation.interleaved, rotation.start)
    assert found == ROTATIONS[kind]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 9},
        {"repetition_penalty": 1.3},
        {"use_cache": True, "output_logits": True, "min_new_tokens": 4},
    ],
    ids=str,
)
def test_ways_of_decoding(llamas, implementation, options):
    same(llamas[implementation], IDS[:1] if "prefill_chunk_size" not in options else IDS, **options)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_padding_on_the_left(kind, implementation):
    mask = torch.ones_like(IDS)
    mask[1, :13] = 0
    net = tiny(kind, implementation)
    same(net, torch.where(mask.bool(), IDS, 0), attention_mask=mask)
    same(net, torch.where(mask.bool(), IDS, 0), attention_mask=mask, num_beams=2)


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["assistant", "lookup"])
def test_assisted_decoding_crops(llamas, implementation, options):
    ids = torch.cat([ONE, ONE[:, :20]], 1)
    options = options or {"assistant_model": tiny("llama", num_hidden_layers=1)}
    cache = same(llamas[implementation], ids, tokens=20, **options)
    assert cache.get_seq_length() == ids.shape[1] + 19


@IMPLEMENTATIONS
def test_a_second_turn_goes_on_with_the_same_cache(llamas, implementation):
    net, cache = llamas[implementation], exact()
    first = same(net, cache=cache)
    assert first.get_seq_length() == ONE.shape[1] + 11
    said = net.generate(ONE, max_new_tokens=12, do_sample=False)
    more = torch.cat([said, ONE[:, :5]], 1)
    second = net.generate(more, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(second, net.generate(more, max_new_tokens=8, do_sample=False))


@IMPLEMENTATIONS
@pytest.mark.parametrize("configured", [False, True])
def test_reset_starts_afresh(implementation, configured):
    net = tiny("gemma3", implementation)
    cache = exact(config=net.config if configured else None)
    a = same(net, cache=cache).get_seq_length()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert same(net, IDS, cache=cache).get_seq_length() == a
