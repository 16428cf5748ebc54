"""What a mask that is missing means to the attention "lowrank": what it means to the model's own attentions."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import lowrank_layers as lr
from lowrank_layers.kv_cache.masks import biased, selected

from .tiny import model
from .transformers.tiny_models import tiny
from .transformers.tiny_seq2seq import NAMES, padded, seq2seq, source

pytestmark = pytest.mark.filterwarnings("ignore")
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
    lr.LowRankCache  # noqa: B018 - transformers knows the implementation from here on
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
    caches = lr.LowRankCache(16, keep_recent=6, keep_first=2, block=4), DynamicCache()
    for cache, name in zip(caches, ("lowrank", "eager"), strict=True):
        inputs = {"past_key_values": cache, "is_causal": causal}
        found.append(torch.cat([outputs(net, name, input_ids=part, **inputs) for part in IDS.split([12, 5, 3], 1)], 1))
    close(*found)
    assert any(getattr(layer, "compressed", 0) for layer in caches[0].layers)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_first_tokens_of_a_static_cache(kind):
    net, found = model(kind), []
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
    net, found = tiny("deepseek_v32"), []
    for name in ("lowrank", "eager"):
        cache = DynamicCache(config=net.config)
        found.append([outputs(net, name, input_ids=part, past_key_values=cache) for part in IDS.split([15, 4, 1], 1)])
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def test_blocks_that_an_indexer_picks_are_refused():
    from lowrank_layers.kv_cache.transformers.attention import lowrank_attention

    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with pytest.raises(lr.LowRankError, match="set_attn_implementation"):
        lowrank_attention(torch.nn.Identity(), q, k, v, None, block_indices=torch.zeros(1, 2, 4, 1))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("causal", [True, False])
def test_factorized_attentions_keep_the_models_word(kind, causal):
    net = tiny(kind)
    inputs = {"input_ids": IDS, "is_causal": causal}
    expected = outputs(net, "sdpa", **inputs)
    lr.factorize_kv_(net, rank=16)
    close(outputs(net, "sdpa", **inputs), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_absorbed_latents_keep_the_models_word(causal):
    net, found = tiny("deepseek_v3"), []
    if not hasattr(net.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this version of transformers caches expanded keys and values")
    for absorb in (False, True):
        if absorb:
            lr.absorb_mla_(net)
        inputs = {"past_key_values": DynamicCache(), "is_causal": causal}
        found.append(torch.cat([outputs(net, "sdpa", input_ids=part, **inputs) for part in IDS.split([17, 3], 1)], 1))
    close(*found)


def test_a_bias_and_a_mask_make_one():
    bias = torch.randn(1, 2, 3, 5)
    lower = torch.ones(3, 5, dtype=torch.bool).tril(2)
    lowest = torch.finfo(torch.float32).min
    causal = torch.where(lower, bias, lowest)
    torch.testing.assert_close(biased(None, bias, causal=True), causal)
    torch.testing.assert_close(biased(None, bias, causal=False), bias)
    torch.testing.assert_close(biased(None, bias[:, :, :1], causal=True), bias[:, :, :1])
    torch.testing.assert_close(biased(lower[None, None], bias, causal=False), causal)
    torch.testing.assert_close(biased(bias, bias, causal=True), 2 * bias)


def test_picked_tokens_and_a_mask_make_one():
    picked = torch.tensor([[[0, 1], [0, 4], [2, 3]]])
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    chosen[[0, 0, 1, 1, 2, 2], [0, 1, 0, 4, 2, 3]] = True
    lower = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(selected(None, picked, 5, causal=False)[0, 0], chosen)
    assert torch.equal(selected(None, picked, 5, causal=True)[0, 0], chosen & lower)
    assert torch.equal(selected(lower[None, None], picked, 5, causal=False)[0, 0], chosen & lower)
    added = selected(torch.zeros(1, 1, 3, 5), picked, 5, causal=False)[0, 0]
    assert torch.equal(added == 0, chosen)
