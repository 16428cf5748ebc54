"""How models rotate their keys, whatever their functions look like, and what happens where that cannot be read."""

import sys
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache

import lowrank_layers as lr
from lowrank_layers.kv_cache.transformers import rope as reader

from .caches import IDS, KEEP, WARNINGS
from .tiny_models import SIZES, tiny

pytestmark = WARNINGS

SHARED = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}
V4 = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "o_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 64,
}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
KINDS = {
    "one tensor": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        SHARED | {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4, "altup_num_inputs": 2},
        [(8, False, 0)] * 2,
    ),
    "another size in some layers": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        SHARED | {"global_head_dim": 32},
        [(8, False, 0), (16, False, 0)],
    ),
    "tokens before heads, complex": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 4,
        },
        [(8, True, 0)] * 3 + [None],
    ),
    "the last entries of a head": ("DeepseekV4Config", "DeepseekV4ForCausalLM", V4, [(4, True, 8)] * 2),
    "the other way round": ("NanoChatConfig", "NanoChatForCausalLM", {}, [(8, False, 0)] * 2),
}


def made(kind):
    config, network, sizes, _ = KINDS[kind]
    if not hasattr(transformers, network):
        pytest.skip(f"this version of transformers has no {network}")
    torch.manual_seed(0)
    net = getattr(transformers, network)(getattr(transformers, config)(**(SIZES | sizes))).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.05)
    return net


def logits(net, implementation, cache):
    net.set_attn_implementation(implementation)
    with torch.no_grad():
        parts = [net(part, past_key_values=cache).logits for part in IDS.split([28, 1, 1, 10], 1)]
    return torch.cat(parts, 1)


def found(cache):
    turned = [layer.kv.rotation for layer in cache.layers if layer.kv is not None]
    return [None if r is None else (len(r.frequencies), r.interleaved, r.start) for r in turned]


@pytest.mark.parametrize("implementation", ["lowrank", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_rotations_are_read_off_every_kind_of_function(kind, implementation):
    net = made(kind)
    expected = logits(net, "eager", DynamicCache())
    for rope in ("before", "after"):
        cache = lr.LowRankCache(lr.Energy(1.0), rope=rope, **KEEP)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "LowRankCache: how")
            ours = logits(net, implementation, cache)
        assert float((ours - expected).norm() / expected.norm()) < 1e-3
        assert any(layer.compressed for layer in cache.layers)
        assert found(cache) == (KINDS[kind][3] if rope == "before" else [None] * len(found(cache)))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_without_their_rotation_are_one_point(kind):
    """Equal vectors at all positions lie in one plane a pair when they are turned; turned back they are one."""
    cache, net = lr.LowRankCache(4, **KEEP), made(kind)
    logits(net, "lowrank", cache)
    kv = next(layer.kv for layer in cache.layers if layer.kv is not None and layer.kv.rotation is not None)
    size = kv.dense()[0].shape[3]
    one = torch.randn(1, 1, 1, size).expand(1, 1, 30, size)
    turned = kv.rotation.turn(one, torch.arange(30))
    again = lr.LowRankKV(lr.KVSettings(rank=1, keep_recent=0, keep_first=0, block=8), kv.rotation)
    again.append(turned, turned)
    again.compress()
    torch.testing.assert_close(again.dense()[0], turned, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "rotated"), [("cohere2", [True, False]), ("smollm3", [True, False])])
def test_layers_that_do_not_rotate_have_no_rotation(kind, rotated):
    net = tiny(kind)
    cache = lr.LowRankCache(rank=4, keep_recent=8, block=4)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
    assert [layer.kv.rotation is not None for layer in cache.layers] == rotated


@pytest.mark.parametrize("broken", ["function", "class", "missing"])
def test_what_cannot_be_read_is_said_once_and_compressed_as_it_comes(broken, monkeypatch):
    net = tiny("llama")
    expected = logits(net, "eager", DynamicCache())
    code = sys.modules[type(net.model.layers[0].self_attn).__module__]
    if broken == "class":
        kind = type("LlamaRotaryEmbedding", (), {"__module__": code.__name__, "__init__": lambda *_: 1 / 0})
        monkeypatch.setattr(code, "LlamaRotaryEmbedding", kind)
    else:
        monkeypatch.setattr(reader, "APPLY", ("rotate_half",) if broken == "function" else ())
    assert code.rotate_half is not None
    cache = lr.LowRankCache(16, **KEEP)
    with pytest.warns(UserWarning, match="how llama rotates its keys could not be read") as caught:
        ours = logits(net, "lowrank", cache)
    assert len([each for each in caught if "rotates" in str(each.message)]) == 1
    assert found(cache) == [None, None]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(net, "lowrank", lr.LowRankCache(16, rope="after", **KEEP))


def test_layers_that_share_keys_see_a_prompt_as_it_is():
    net = made("one tensor")
    expected = logits(net, "eager", DynamicCache())[:, :28]
    cache = lr.LowRankCache(1, **KEEP)
    ours = logits(net, "lowrank", cache)[:, :28]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(layer.compressed for layer in cache.layers)


def test_positions_with_several_axes_are_read_as_one():
    """Text has the same position on all axes, and its keys are rotated as those of a model with one."""
    if not hasattr(transformers, "Qwen2VLTextModel"):
        pytest.skip("this version of transformers has no Qwen2VLTextModel")
    torch.manual_seed(0)
    net = transformers.Qwen2VLTextModel(transformers.Qwen2VLTextConfig(**SIZES, **AXES)).eval()
    caches = lr.LowRankCache(16, **KEEP), DynamicCache()
    out = []
    for cache, implementation in zip(caches, ("lowrank", "eager"), strict=True):
        net.set_attn_implementation(implementation)
        with torch.no_grad():
            parts = [net(part, past_key_values=cache).last_hidden_state for part in IDS.split([28, 1, 1, 10], 1)]
        out.append(torch.cat(parts, 1))
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)
    assert found(caches[0]) == [(8, False, 0)] * 2
