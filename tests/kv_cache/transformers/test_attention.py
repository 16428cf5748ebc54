"""The attention "lowrank" computes what a model's own does: masks, none, causality, other caches than ours."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import lowrank_layers as lr
from lowrank_layers.kv_cache.transformers.attention import lowrank_attention

from .caches import WARNINGS, exact
from .tiny_models import peaked, tiny
from .tiny_seq2seq import NAMES, padded, seq2seq, source

pytestmark = WARNINGS
IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(3))
TO_DECODE = IDS[:, :9].flip(1)
MASK = torch.ones_like(IDS)
MASK[1, 15:] = 0
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
MODELS = {
    "encoder": ("BertConfig", "BertModel", SIZES),
    "encoder as a decoder": ("BertConfig", "BertModel", SIZES | {"is_decoder": True}),
    "rotated encoder": ("ModernBertConfig", "ModernBertModel", SIZES | {"local_attention": 8, "pad_token_id": 0}),
    "position bias": ("MPNetConfig", "MPNetModel", SIZES),
    "decoder": ("LlamaConfig", "LlamaModel", SIZES),
    "window": ("Gemma3TextConfig", "Gemma3TextModel", GEMMA),
    "window, both ways": ("Gemma3TextConfig", "Gemma3TextModel", GEMMA | {"use_bidirectional_attention": True}),
    "soft cap": ("Gemma2Config", "Gemma2Model", GEMMA),
    "sinks": ("GptOssConfig", "GptOssModel", GEMMA | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


def scaled(config, network, sizes):
    torch.manual_seed(0)
    made = getattr(transformers, network)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4).add_(torch.randn_like(parameter), alpha=0.1)
    return made


def outputs(net, implementation, **inputs):
    net.set_attn_implementation(implementation)
    with torch.no_grad():
        return net(**inputs)[0]


def close(ours, theirs, keep=None):
    if keep is not None:
        ours, theirs = ours[keep.bool()], theirs[keep.bool()]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("kind", NAMES)
def test_encoders_and_cross_attentions_look_both_ways(kind):
    net = seq2seq(kind)
    for inputs in (source(kind), padded(kind)):
        inputs = inputs | {"decoder_input_ids": TO_DECODE, "use_cache": False}
        close(*(outputs(net, name, **inputs) for name in ("lowrank", "eager")))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("asked", [{}, {"is_causal": False}, {"is_causal": True}], ids=str)
def test_the_models_word_about_causality_is_kept(kind, asked):
    net = scaled(*MODELS[kind])
    plain = "eager" if kind in ("soft cap", "sinks", "position bias") else "sdpa"
    for mask in (None, MASK):
        keep = None if mask is None else MASK
        inputs = {"input_ids": IDS, "attention_mask": mask} | asked
        close(outputs(net, "lowrank", **inputs), outputs(net, plain, **inputs), keep)
    if kind == "soft cap" and asked == {"is_causal": False}:
        causal = outputs(net, "lowrank", input_ids=IDS)
        assert float((causal - outputs(net, "lowrank", **inputs)).norm() / causal.norm()) > 0.1


@pytest.mark.parametrize("kind", ["decoder", "soft cap", "sinks"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_cache_keeps_the_models_word_about_causality(kind, causal):
    net, found = scaled(*MODELS[kind]), []
    caches = exact(), DynamicCache()
    for cache, name in zip(caches, ("lowrank", "eager"), strict=True):
        inputs = {"past_key_values": cache, "is_causal": causal}
        found.append(torch.cat([outputs(net, name, input_ids=part, **inputs) for part in IDS.split([12, 5, 3], 1)], 1))
    close(*found)
    assert any(getattr(layer, "compressed", 0) for layer in caches[0].layers)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_first_tokens_of_a_static_cache(kind):
    net, found = tiny(kind), []
    for name in ("lowrank", "eager"):
        cache = StaticCache(config=net.config, max_cache_len=30)
        found.append([outputs(net, name, input_ids=part, past_key_values=cache) for part in IDS.split([12, 5, 3], 1)])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def test_queries_that_a_model_drops_are_the_first_ones():
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this version of transformers has no Gemma 4")
    sizes = SIZES | {"head_dim": 16, "global_head_dim": 16, "sliding_window": 64, "num_key_value_heads": 2}
    sizes |= {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
    sizes |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    net = scaled("Gemma4TextConfig", "Gemma4ForCausalLM", sizes)
    found = [outputs(net, "lowrank", input_ids=IDS, logits_to_keep=count) for count in (0, 3, 1)]
    close(found[1], found[0][:, -3:])
    close(found[2], found[0][:, -1:])


def test_tokens_that_an_indexer_picks():
    net, found = peaked("deepseek_v32"), []
    for name in ("lowrank", "eager"):
        cache = DynamicCache(config=net.config)
        found.append([outputs(net, name, input_ids=part, past_key_values=cache) for part in IDS.split([15, 4, 1], 1)])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def test_blocks_that_an_indexer_picks_are_refused():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with pytest.raises(lr.LowRankError, match="set_attn_implementation"):
        lowrank_attention(torch.nn.Identity(), q, k, v, None, block_indices=torch.zeros(1, 2, 4, 1))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("causal", [True, False])
def test_factorized_attentions_keep_the_models_word(kind, causal):
    net = peaked(kind)
    inputs = {"input_ids": IDS, "is_causal": causal}
    expected = outputs(net, "sdpa", **inputs)
    lr.factorize_kv_(net, rank=16)
    close(outputs(net, "sdpa", **inputs), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_absorbed_latents_keep_the_models_word(causal):
    net, found = peaked("deepseek_v3"), []
    if not hasattr(net.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this version of transformers caches expanded keys and values")
    for absorb in (False, True):
        if absorb:
            lr.absorb_mla_(net)
        inputs = {"past_key_values": DynamicCache(), "is_causal": causal}
        found.append(torch.cat([outputs(net, "sdpa", input_ids=part, **inputs) for part in IDS.split([17, 3], 1)], 1))
    close(*found)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_the_implementation_serves_other_caches_and_none(kind):
    net = tiny(kind, "lowrank")
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    with torch.no_grad():
        ours = net(IDS, attention_mask=mask, use_cache=False).logits
        cached = net(IDS, attention_mask=mask, past_key_values=DynamicCache(config=net.config)).logits
        net.set_attn_implementation("eager")
        theirs = net(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1, 5:], theirs[1, 5:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cached[0], theirs[0], rtol=0, atol=1e-5)
