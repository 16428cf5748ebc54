"""Encoder-decoders with LowRankCache for both of their attentions: at full rank the tokens of DynamicCache."""

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import lowrank_layers as lr

from .caches import KEEP, WARNINGS
from .tiny_seq2seq import GEMMA, check_it_calls_an_attention, compressed, exact, padded, seq2seq, source, twice

pytestmark = WARNINGS
KINDS = pytest.mark.parametrize("kind", ["t5", "whisper", "bart", "t5gemma"])
BOTH = pytest.mark.parametrize("implementation", ["lowrank", "eager"])
START = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))


def same(net, inputs, kind, tokens=16, **options):
    """The tokens of DynamicCache, after ours were compared with them in both implementations."""
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | options

    def generated(implementation, cache):
        net.set_attn_implementation(implementation)
        torch.manual_seed(5)
        return net.generate(**inputs, past_key_values=cache, **options)

    plain = EncoderDecoderCache(*twice(DynamicCache))
    expected = generated("eager", plain)
    for implementation in ("lowrank", "eager"):
        cache = exact(kind)
        assert torch.equal(generated(implementation, cache), expected)
        assert cache.get_seq_length() == plain.get_seq_length()
        assert compressed(cache)
    return expected


MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 3, "decoder_input_ids": START},
    "begun": {"decoder_input_ids": START},
    "penalized": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


WAYS = [(kind, mode) for kind in ("t5", "whisper", "bart", "t5gemma") for mode in MODES]
# transformers itself gives Whisper's decoder two position_ids then, with any cache
WAYS.remove(("whisper", "chunks"))
OLD = int(transformers.__version__.split(".")[1]) < 14
if OLD:  # it appends the encoder's keys with every chunk, to any cache
    WAYS.remove(("t5gemma", "chunks"))


@pytest.mark.parametrize(("kind", "mode"), WAYS)
def test_every_way_of_decoding(kind, mode):
    net = seq2seq(kind)
    for inputs in [source(kind)] if kind == "whisper" else [source(kind), padded(kind)]:
        out = same(net, inputs, kind, **MODES[mode])
        assert kind in ("bart", "t5gemma") or len(out.unique()) > 5  # attention decides


@KINDS
@pytest.mark.parametrize("mode", ["assistant", "sampling assistant", "lookup"])
def test_assisted_decoding_crops(kind, mode):
    net, inputs = seq2seq(kind), source(kind, 1)
    if mode == "lookup":
        options = {"prompt_lookup_num_tokens": 3, "decoder_input_ids": START[:1].repeat(1, 3)}
    else:
        helper = seq2seq(kind)
        with torch.no_grad():  # one that is often right, and often not
            for parameter in helper.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        options = {"assistant_model": helper, "do_sample": mode != "assistant"}
    # no least number, which assistants refuse until 5.4: the token that would end is never chosen
    options |= {"min_new_tokens": None, "suppress_tokens": [96]}
    same(net, inputs, kind, tokens=24, **options)


@BOTH
@KINDS
def test_generation_goes_on_with_the_same_cache(kind, implementation):
    if OLD and kind == "t5gemma":
        pytest.skip("it appends the encoder's keys with every call, to any cache")
    net, inputs, cache, found = seq2seq(kind), source(kind), exact(kind), []
    options = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 10}
    for name, past in ((implementation, cache), ("eager", EncoderDecoderCache(*twice(DynamicCache)))):
        net.set_attn_implementation(name)
        first = net.generate(**inputs, past_key_values=past, **options)
        more = torch.cat([first if kind != "whisper" else torch.cat([START[:, :1] * 0 + 2, first], 1), START], 1)
        found.append((first, net.generate(**inputs, past_key_values=past, decoder_input_ids=more, **options)))
        if past is cache:
            assert compressed(cache)
            cache.reset()
            assert torch.equal(net.generate(**inputs, past_key_values=cache, **options), first)
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@BOTH
@KINDS
def test_logits_step_by_step(kind, implementation):
    net, inputs = seq2seq(kind), padded(kind)
    encoder, second = lr.LowRankCache(16, **KEEP), exact(kind)
    caches = (
        EncoderDecoderCache(lr.LowRankCache(16, **KEEP), encoder),
        second,
        EncoderDecoderCache(*twice(DynamicCache)),
    )
    found = []
    for cache in caches:
        net.set_attn_implementation("eager" if cache is caches[2] else implementation)
        with torch.no_grad():
            parts = [
                net(**inputs, decoder_input_ids=part, past_key_values=cache).logits
                for part in START.repeat(1, 4).split([9, 4, 1, 1, 13], 1)
            ]
        found.append(torch.cat(parts, 1))
    assert compressed(caches[0])
    for ours in found[:2]:
        assert float((ours - found[2]).norm() / found[2].norm()) < 1e-3


@pytest.mark.parametrize("changes", [{"rank": 4}, {"rank": 8, "dtype": torch.int8, "joint": False}], ids=str)
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_below_full_rank_a_step_sees_what_is_stored(kind, changes):
    net, inputs = seq2seq(kind, attn_implementation="lowrank"), source(kind)
    cache, plain = exact(kind, **changes), EncoderDecoderCache(*twice(DynamicCache))
    with torch.no_grad():
        for each in (cache, plain):
            net(**inputs, decoder_input_ids=START.repeat(1, 3), past_key_values=each)
        lossy = 0.0
        for ours, theirs in zip(twice_of(cache), twice_of(plain), strict=True):
            for layer, own in zip(theirs.layers, ours.layers, strict=True):
                lossy = max(lossy, float((layer.keys - own.keys).abs().max()))
                layer.keys, layer.values = own.keys, own.values
        decoded, expected = (
            net(**inputs, decoder_input_ids=START[:, :3], past_key_values=each).logits for each in (cache, plain)
        )
    assert compressed(cache)
    assert lossy > 1e-3
    assert float((decoded - expected).norm() / expected.norm()) < 1e-4


def twice_of(cache):
    return cache.self_attention_cache, cache.cross_attention_cache


WAYS_TO_COPY = {
    "copy": lambda cache, path: copy.deepcopy(cache),
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "file": lambda cache, path: through_files(cache, path),
}


def through_files(cache, path):
    for name, each in zip("ab", twice_of(cache), strict=True):
        each.save(path / name)
    return EncoderDecoderCache(*(lr.LowRankCache.load(path / name) for name in "ab"))


@pytest.mark.parametrize("way", WAYS_TO_COPY)
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_copies_go_on_alone_and_read_coefficients(kind, way, tmp_path, monkeypatch):
    net, inputs, cache = seq2seq(kind, attn_implementation="lowrank"), source(kind), exact(kind, rank=5)
    check_it_calls_an_attention(net)
    with torch.no_grad():
        net(**inputs, decoder_input_ids=START, past_key_values=cache)
        other = WAYS_TO_COPY[way](cache, tmp_path)
        monkeypatch.setattr(lr.LowRankKV, "side", lambda *_: pytest.fail("keys or values were rebuilt"))
        a, b = (net(**inputs, decoder_input_ids=START[:, :3], past_key_values=each).logits for each in (cache, other))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "whisper", "bart"])
@pytest.mark.parametrize("way", ["generate", "call"])
def test_one_cache_for_both_attentions_is_refused_with_what_to_write(kind, way):
    if OLD and (kind, way) == ("whisper", "generate"):
        pytest.skip("it ends in an UnboundLocalError with any cache")
    net, cache = seq2seq(kind), lr.LowRankCache(16, **KEEP)
    call = partial(net.generate, max_new_tokens=3) if way == "generate" else net
    with torch.no_grad(), pytest.raises(lr.LowRankError, match=r"EncoderDecoderCache\(LowRankCache"):
        call(**source(kind), decoder_input_ids=START, past_key_values=cache)
    assert (len(cache.layers), cache.get_seq_length(), cache.nbytes()) == (0, 0, 0)


def test_a_budget_for_an_encoder_is_refused():
    net, cache = seq2seq("t5"), EncoderDecoderCache(DynamicCache(), lr.LowRankCache(budget=0.5))
    with torch.no_grad(), pytest.raises(lr.LowRankError, match="give rank="):
        net(**source("t5"), decoder_input_ids=START, past_key_values=cache)


def test_offloading_is_refused_with_what_to_write():
    if OLD:
        pytest.skip("its generate takes the second cache as it is")
    net, cache = seq2seq("t5gemma"), EncoderDecoderCache(*twice(lr.LowRankCache))
    with pytest.raises(lr.LowRankError, match=r"LowRankCache\(...\), DynamicCache\(\)"):
        net.generate(**source("t5gemma"), past_key_values=cache, max_new_tokens=3)


def bert():
    sizes = {key: GEMMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    encoder, decoder = (
        transformers.BertConfig(**sizes, num_attention_heads=4, is_decoder=each, add_cross_attention=each)
        for each in (False, True)
    )
    joined = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(joined)


def t5gemma2():
    """One attention to the decoder's and the encoder's tokens."""
    if not hasattr(transformers, "T5Gemma2Config"):
        pytest.skip("this version of transformers has no T5Gemma 2")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    parts = {"encoder": {"text_config": GEMMA, "vision_config": vision}, "decoder": GEMMA}
    return transformers.T5Gemma2ForConditionalGeneration(transformers.T5Gemma2Config(**parts))


@pytest.mark.parametrize("make", [bert, t5gemma2])
@BOTH
def test_attentions_that_are_laid_out_otherwise(make, implementation):
    torch.manual_seed(0)
    net, found = make().eval(), []
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.15)
    caches = exact(None), EncoderDecoderCache(*twice(DynamicCache))
    for cache, name in zip(caches, (implementation, "eager"), strict=True):
        net.set_attn_implementation(name)
        with torch.no_grad():
            parts = [
                net(**source("t5"), decoder_input_ids=part, past_key_values=cache).logits
                for part in START.repeat(1, 4).split([12, 1, 1, 14], 1)
            ]
        found.append(torch.cat(parts, 1))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3
    assert compressed(caches[0])
    own, encoder = ([layer.kv.rotation is not None for layer in each.layers] for each in twice_of(caches[0]))
    assert (own, encoder) == ([make is t5gemma2] * 2, [False] * 2)
    with torch.no_grad(), pytest.raises(lr.LowRankError, match="EncoderDecoderCache"):
        net(**source("t5"), decoder_input_ids=START, past_key_values=lr.LowRankCache(16, **KEEP))
