"""Continuous batching is refused before it begins where low rank is meant, and goes on as ever elsewhere."""

import threading

import pytest
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

import lowrank_layers as lr

from .caches import IDS, WARNINGS, exact
from .tiny_models import tiny

pytestmark = WARNINGS
PROMPTS = IDS.tolist()


def paired(cache):
    return EncoderDecoderCache(DynamicCache(), cache)


REFUSED = {
    "attention, at once": ("lowrank", "the attention 'lowrank'", lambda net, _: net.generate_batch(PROMPTS)),
    "attention, manager": ("lowrank", "the attention 'lowrank'", lambda net, _: net.init_continuous_batching()),
    "cache": ("sdpa", "a LowRankCache", lambda net, cache: net.generate_batch(PROMPTS, past_key_values=cache)),
    "pair": ("sdpa", "a LowRankCache", lambda net, cache: net.generate_batch(PROMPTS, past_key_values=paired(cache))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_happens(name):
    implementation, got, call = REFUSED[name]
    net, cache, threads = tiny("llama", implementation), exact(), threading.active_count()
    with pytest.raises(lr.LowRankError, match=rf"got {got} in \w+, but continuous batching .* model\.generate"):
        call(net, cache)
    assert net.config._attn_implementation == implementation
    assert threading.active_count() == threads
    assert cache.get_seq_length() == 0
    net.generate(IDS, past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_a_paged_cache_by_name_is_refused_beside_ours():
    net, cache = tiny("llama", "sdpa"), exact()
    with pytest.raises((lr.LowRankError, ValueError)):  # the latter where a version knows no such name
        net.generate(IDS, past_key_values=cache, cache_implementation="paged", max_new_tokens=2)
    assert cache.get_seq_length() == 0


def test_without_low_rank_it_is_as_it_was():
    generation = pytest.importorskip("transformers.generation.configuration_utils")
    if not hasattr(generation, "ContinuousBatchingConfig"):
        pytest.skip("this version has no ContinuousBatchingConfig")
    net = tiny("llama", "sdpa")
    expected = net.generate(IDS, max_new_tokens=6, do_sample=False)[:, IDS.shape[1] :].tolist()
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=96, pad_token_id=0)
    pages = generation.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = net.generate_batch(PROMPTS, generation_config=greedy, continuous_batching_config=pages)
    assert [each.generated_tokens for each in found.values()] == expected
    assert type(net).generate_batch.__name__ == "generate_batch"
