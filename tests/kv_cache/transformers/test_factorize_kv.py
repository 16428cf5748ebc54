"""Factorized key and value projections: the model's own numbers at full rank, and the best ones below it."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.kv_cache import LatentAttention
from lowrank_layers.kv_cache.compressed_tokens import HeadGroups

from .tiny_models import SIZE, cached, generated, logits, peaked, prompts, transformers

LAYOUTS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "cohere", "smollm3", "opt", "gpt_oss")
LAYOUTS += ("cohere2", "nanochat")  # rotated in some layers only, and the other way round


def attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def biased(**settings: Any) -> nn.Module:
    return peaked("llama", attention_bias=True, **settings)


def statistics(model: nn.Module, batches: int = 4) -> lr.Statistics:
    return lr.calibrate(model, [{"input_ids": torch.randint(3, 97, (2, 40))} for _ in range(batches)])


def rebuilt(side: Any, x: Tensor, size: int = SIZE) -> Tensor:
    """``up (down x) + bias``, as the flat output of the projection."""
    latents = side(x)[:, None]
    heads = [part.rebuilt(0, x.shape[1], x.dtype) for part in side.parts(latents, size)]
    return torch.cat(heads, 1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_full_rank_is_the_model(kind, joint):
    ids, mask = prompts()
    model = peaked(kind)
    dense = copy.deepcopy(model)
    assert lr.factorize_kv_(model, rank=SIZE, joint=joint) is model
    exact = logits(dense, ids, mask)
    assert (logits(model, ids, mask) - exact).abs().max() <= 1e-5 * exact.abs().max().clamp_min(1)
    assert torch.equal(generated(model, ids, mask), generated(dense, ids, mask))
    assert torch.equal(generated(model, ids, mask, num_beams=3), generated(dense, ids, mask, num_beams=3))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_full_rank_with_statistics(implementation):
    ids, mask = prompts()
    model = biased(attn_implementation=implementation)
    exact = logits(model, ids, mask)
    lr.factorize_kv_(model, statistics(model), rank=SIZE)
    torch.testing.assert_close(logits(model, ids, mask), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("joint", "width"), [(True, 2), (False, 2)])
def test_cache_holds_latents(joint, width):
    ids, mask = prompts()
    model = peaked("llama")
    before = sum(k.nbytes + v.nbytes for k, v in cached(model, ids, mask))
    lr.factorize_kv_(model, rank=4, value_rank=8, joint=joint)
    layers = cached(model, ids, mask)
    assert [(k.shape, v.shape) for k, v in layers] == [((2, 1, 12, 4 * width), (2, 1, 12, 8 * width))] * 2
    assert sum(k.nbytes + v.nbytes for k, v in layers) * 2 * SIZE == before * (4 + 8)


def test_values_are_lifted_only_where_the_output_would_grow():
    for joint, rank, absorbed in ((True, 8, True), (True, 9, False), (False, 16, True)):
        model = biased()
        before = model.get_submodule("model.layers.0.self_attn.o_proj").weight.numel()
        (first, _) = attentions(lr.factorize_kv_(model, rank=rank, joint=joint))
        assert (len(first.v_proj.up) == 0) is absorbed
        assert first.o_proj.weight.numel() <= before


def test_absorbed_and_lifted_values_agree():
    ids, mask = prompts()
    one, two = biased(), biased()
    lr.factorize_kv_(one, rank=5)
    for _, module in two.named_modules():
        if hasattr(module, "v_proj"):  # an output projection of another class is left alone
            module.o_proj.__class__ = type("Other", (nn.Linear,), {})
    lr.factorize_kv_(two, rank=5)
    assert [len(a.v_proj.up) for a in attentions(one) + attentions(two)] == [0, 0, 1, 1]
    torch.testing.assert_close(logits(one, ids, mask), logits(two, ids, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_plain_error_is_the_discarded_singular_values(joint):
    model = peaked("qwen2")
    linear = model.get_submodule("model.layers.0.self_attn.k_proj")
    first = attentions(lr.factorize_kv_(model, rank=5, joint=joint))[0]
    eye = torch.eye(linear.in_features)[None]
    product = rebuilt(first.k_proj, eye)[0].mT - first.k_proj.bias[:, None]
    blocks = linear.weight.double().unflatten(0, (1 if joint else 2, -1))
    left = sum(torch.linalg.svdvals(block)[10 if joint else 5 :].square().sum() for block in blocks)
    torch.testing.assert_close((linear.weight - product).double().square().sum(), left, atol=0, rtol=1e-4)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weighted_error_is_the_discarded_singular_values(kind, joint):
    model = peaked(kind)
    linear = model.get_submodule("model.layers.1.self_attn.k_proj")
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    stats = statistics(model)
    hook.remove()
    second = attentions(lr.factorize_kv_(model, stats, rank=5, joint=joint))[1]
    x = torch.cat(seen)
    error = (linear(x) - rebuilt(second.k_proj, x)).double().flatten(0, 1)
    centred = (x - x.mean((0, 1))).double().flatten(0, 1)
    keys = (centred @ linear.weight.double().mT).unflatten(1, (1 if joint else 2, -1))
    left = sum(torch.linalg.svdvals(group)[10 if joint else 5 :].square().sum() for group in keys.unbind(1))
    torch.testing.assert_close(error.square().sum(), left, atol=0, rtol=1e-3)
    assert error.mean(0).abs().max() < 1e-5  # the mean of what was seen is kept by the bias


def test_statistics_help_where_they_were_taken():
    model = peaked("llama")
    stats = statistics(model)
    ids = torch.randint(3, 97, (4, 40))
    mask = torch.ones_like(ids)
    exact = logits(model, ids, mask)
    errors = [
        (logits(lr.factorize_kv_(copy.deepcopy(model), each, rank=4), ids, mask) - exact).norm()
        for each in (stats, None)
    ]
    assert errors[0] < errors[1]


def test_rank_rules_give_every_head_its_own():
    ids, mask = prompts()
    model = peaked("llama")
    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.weight.data[SIZE + 3 : 2 * SIZE] = 0  # the second head has three directions
            module.v_proj.weight.data[3:SIZE] = 0
    exact = logits(model, ids, mask)
    first = attentions(lr.factorize_kv_(model, rank=lr.RelativeError(1e-6), joint=False))[0]
    assert [up.shape[2] for up in first.k_proj.up] == [SIZE, 3]
    assert [up.shape[2] for up in first.v_proj.up] == [3, SIZE]
    torch.testing.assert_close(logits(model, ids, mask), exact, atol=1e-5, rtol=1e-5)
    assert cached(model, ids, mask)[0][0].shape == (2, 1, 12, SIZE + 3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
def test_steps_are_the_whole(kind, monkeypatch):
    """A prompt in pieces gives what it gives at once, over several tiles of rebuilt keys."""
    for module in ("segments", "rope", "transformers.latent_tokens"):
        monkeypatch.setattr(import_module(f"lowrank_layers.kv_cache.{module}"), "TILE", 5)
    model = lr.factorize_kv_(peaked(kind), rank=6)
    ids = torch.randint(3, 97, (2, 17))
    past = transformers.DynamicCache()
    with torch.no_grad():
        parts = [model(part, past_key_values=past, use_cache=True).logits for part in ids.split([11, 1, 4, 1], 1)]
        whole = model(ids).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_what_is_cached_is_never_rebuilt_whole(monkeypatch):
    sizes, rebuilt = [], HeadGroups.rebuilt

    def counted(part, start, stop, dtype):
        sizes.append(stop - start)
        return rebuilt(part, start, stop, dtype)

    monkeypatch.setattr(import_module("lowrank_layers.kv_cache.segments"), "TILE", 4)
    monkeypatch.setattr(HeadGroups, "rebuilt", counted)
    model = lr.factorize_kv_(peaked("llama"), rank=6)
    past = transformers.DynamicCache()
    with torch.no_grad():
        model(prompts()[0], past_key_values=past, use_cache=True)
        sizes.clear()
        model(torch.randint(3, 97, (2, 1)), past_key_values=past)
    assert sizes == [4, 4, 4, 1] * 2  # keys, of two layers


def test_copies_and_state():
    ids, mask = prompts()
    model = lr.factorize_kv_(biased(), rank=5)
    exact = logits(model, ids, mask)
    assert torch.equal(logits(copy.deepcopy(model), ids, mask), exact)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids, mask), exact)
    other = biased()
    for parameter in other.parameters():
        parameter.data.normal_()
    other = lr.factorize_kv_(other, rank=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids, mask), exact)
    names = set(model.state_dict())
    assert "model.layers.0.self_attn.k_proj.down.weight" in names
    assert "model.layers.0.self_attn.k_proj.up.0" in names


def test_trains_after_inference_mode():
    model = lr.factorize_kv_(peaked("qwen3"), rank=5)
    ids, mask = prompts()
    with torch.inference_mode():
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask).logits.square().mean().backward()
    for each in attentions(model):
        assert all(p.grad is not None and bool(p.grad.any()) for p in (*each.k_proj.parameters(), each.o_proj.weight))


def test_half_precision():
    ids, mask = prompts()
    model = peaked("llama").to(torch.bfloat16)
    exact = logits(model, ids, mask).float()
    lr.factorize_kv_(model, rank=SIZE)
    assert cached(model, ids, mask)[0][0].dtype == torch.bfloat16
    found = logits(model, ids, mask).float()
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_target():
    model = lr.factorize_kv_(peaked("llama"), rank=4, target=["model.layers.1"])
    assert [a.layer_idx for a in attentions(model)] == [1]
    lr.factorize_kv_(model, rank=8, target=["layers.0.self_attn"])
    assert [a.k_proj.down.out_features for a in attentions(model)] == [16, 8]


def refused(model: nn.Module, match: str, **settings: Any) -> None:
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(lr.LowRankError, match=match):
        lr.factorize_kv_(model, **{"rank": 4, **settings})
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before


def test_bad_input_changes_nothing():
    model = peaked("llama")
    refused(model, "rank 17 for 'model.layers.0.self_attn.k_proj'", rank=17)
    refused(model, "ParameterFraction", rank=0.5)
    refused(model, "rank 0", value_rank=0)
    refused(model, "matches no module", target=["nothing"])
    refused(model, "target=", target=["mlp"])
    refused(model, "expected what lr.calibrate returns", stats={})
    refused(model, "calibrate this very model", stats=lr.Statistics())
    refused(model, "calibrate this very model", stats=statistics(peaked("llama", hidden_size=32, head_dim=SIZE)))
    refused(nn.Linear(4, 4), "no attention with k_proj")
    last = model.get_submodule("model.layers.1.self_attn")
    last.v_proj.weight.data[0, 0] = torch.nan
    refused(model, "v_proj' is torch.float32 on cpu, or has NaN")
    last.v_proj.weight.data[0, 0] = 0
    last.v_proj = lr.LowRankLinear.from_dense(last.v_proj, rank=8)
    refused(model, "LowRankLinear, expected a plain nn.Linear")


def test_other_layouts_are_refused():
    refused(peaked("gpt2"), "'c_attn' makes queries, keys and values at once")
    refused(peaked("olmo2"), "needs the whole key")
    refused(lr.factorize_kv_(peaked("llama"), rank=4), "factorized already")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    refused(peaked("llama", rope_parameters=dynamic), "frequencies change")

    model = peaked("llama")
    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.q_proj.register_forward_hook(lambda _, __, out: out.tanh())
            module.forward = module.forward
    refused(model, "a forward of its own")


def test_what_it_does_not_compute_is_noticed():
    model = peaked("llama")

    class Gated(type(model.get_submodule("model.layers.0.self_attn"))):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return out.relu(), weights

    model.get_submodule("model.layers.1.self_attn").__class__ = Gated
    refused(model, "something else|could not be tried")


def test_caches_and_masks_that_do_not_fit():
    ids, mask = prompts()
    model = lr.factorize_kv_(peaked("llama"), rank=4)
    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(lr.LowRankError, match="DynamicCache"), torch.no_grad():
        model(ids, past_key_values=static)
    layer = model.get_submodule("model.layers.0.self_attn")
    with pytest.raises(lr.LowRankError, match="set_attn_implementation"):
        layer(torch.randn(2, 12, 64), None, mask)
