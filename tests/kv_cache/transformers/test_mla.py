"""Latent attention that decodes from its latents: the same numbers without expanding what is cached."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.kv_cache.transformers.mla import SharedLatentSegment

from .tiny_models import cached, generated, logits, peaked, prompts, transformers

KINDS = ("deepseek_v2", "deepseek_v3", "minicpm3")


def latent(kind: str, **settings: Any) -> nn.Module:
    model = peaked(kind, **settings)
    if not any(hasattr(module, "expand_kv") for module in model.modules()):
        pytest.skip("transformers before 5.15 caches expanded keys and values")
    return model


def expanded(model: nn.Module) -> list[int]:
    """Numbers of tokens that ``kv_b_proj`` was called with."""
    counts: list[int] = []
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[-2]))
    return counts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_generates_the_same(kind, implementation):
    ids, mask = prompts()
    model = latent(kind, attn_implementation=implementation)
    dense = copy.deepcopy(model)
    assert lr.absorb_mla_(model) is model
    assert torch.equal(generated(model, ids, mask), generated(dense, ids, mask))
    assert torch.equal(generated(model, ids, mask, num_beams=3), generated(dense, ids, mask, num_beams=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_steps_have_the_same_logits(kind, count):
    ids, mask = prompts()
    model = latent(kind)
    more = torch.cat([mask, mask.new_ones(2, count)], 1)
    new = torch.randint(3, 97, (2, count))

    def step() -> Tensor:
        past = transformers.DynamicCache()
        model(ids, attention_mask=mask, past_key_values=past, use_cache=True)
        found: Tensor = model(new, attention_mask=more, past_key_values=past).logits
        return found

    with torch.no_grad():
        exact = step()
        lr.absorb_mla_(model)
        assert (step() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_the_history_is_not_expanded():
    ids, mask = prompts()
    model = lr.absorb_mla_(latent("deepseek_v3"))
    counts = expanded(model)
    generated(model, ids, mask)
    assert counts == [12, 12]  # the prompt, once a layer
    assert cached(model, ids, mask)[0][0].shape == (2, 1, 12, 16)


def test_many_new_tokens_run_as_before():
    """Expanding takes fewer multiplications from ``2 r q = (r + q) (k + v)`` on."""
    ids, mask = prompts()
    model = lr.absorb_mla_(latent("deepseek_v3"))
    counts = expanded(model)
    past = transformers.DynamicCache()
    with torch.no_grad():
        for count in (12, 26, 27):  # r = 16, k + v = 20: 26.7
            model(torch.randint(3, 97, (2, count)), past_key_values=past, use_cache=True)
    assert counts == [12, 12, 65, 65]
    assert logits(model, ids, mask).isfinite().all()


def test_a_piece_of_shared_latents_is_what_it_expands_to():
    keys, values = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    piece = SharedLatentSegment(keys, values, torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 2))
    dense = piece.dense_keys(torch.float32), piece.dense_values(torch.float32)
    rows, weights = torch.randn(2, 3, 7, 7), torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(piece.scores(rows), rows @ dense[0].mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(piece.mixed(weights), weights @ dense[1], atol=1e-5, rtol=1e-5)


def test_copies_state_and_repeats():
    ids, mask = prompts()
    model = latent("deepseek_v3")
    names = list(model.state_dict())
    exact = generated(model, ids, mask)
    lr.absorb_mla_(lr.absorb_mla_(model))
    assert list(model.state_dict()) == names
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        counts = expanded(each)
        assert torch.equal(generated(each, ids, mask), exact)
        assert counts == [12, 12]


def test_gradients_pass():
    ids, _ = prompts()
    model = latent("deepseek_v3")
    past = transformers.DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
    grads = []
    for each in (model, lr.absorb_mla_(copy.deepcopy(model))):
        each(ids[:, :2], past_key_values=copy.deepcopy(past)).logits.square().mean().backward()
        grads.append(each.get_submodule("model.layers.0.self_attn.kv_b_proj").weight.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)


def test_bad_input_changes_nothing():
    with pytest.raises(lr.LowRankError, match="no latent attention"):
        lr.absorb_mla_(peaked("llama"))
    sparse = latent("deepseek_v32")
    kinds = [type(module) for module in sparse.modules()]
    with pytest.raises(lr.LowRankError, match="indexer"):
        lr.absorb_mla_(sparse)
    assert [type(module) for module in sparse.modules()] == kinds


def test_versions_that_cache_expanded_keys_are_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.kv_b_proj = nn.Linear(4, 8, bias=False)

    with pytest.raises(lr.LowRankError, match=r"upgrade to transformers 5\.15"):
        lr.absorb_mla_(nn.ModuleList([Attention()]))


def test_a_low_rank_cache_keeps_its_greatest_length_where_latents_stay_exact():
    model, (ids, mask) = latent("deepseek_v3"), prompts()
    cache = lr.LowRankCache(rank=4, max_length=ids.shape[1] + 3)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(lr.LowRankError, match=f"4 more tokens after {ids.shape[1]}.*max_length"):
            model(ids[:, :4], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [ids.shape[1]] * 2
        model(ids[:, :3], past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1] + 3
    fresh = lr.LowRankCache(rank=4, max_length=ids.shape[1] - 1)
    with torch.no_grad(), pytest.raises(lr.LowRankError, match="max_length"):
        model(ids, attention_mask=mask, past_key_values=fresh)
    assert (len(fresh.layers), fresh.get_seq_length()) == (0, 0)
