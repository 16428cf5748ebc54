"""What a LowRankCache holds and how it changes: copies, crops, rows, steps below full rank, bytes."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr

from .caches import IDS, IMPLEMENTATIONS, WARNINGS, compressed, exact, through_a_file
from .tiny_models import tiny

pytestmark = WARNINGS
ONE = IDS[:1]


@pytest.fixture(scope="module")
def llamas():
    return {name: tiny("llama", name) for name in ("lowrank", "sdpa")}


COPIES = {
    "copy": lambda cache, path: copy.deepcopy(cache),
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "file": through_a_file,
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.int8, "rank": 8}, {"rank": lr.Energy(0.9), "joint": False}], ids=str
)
def test_copies_go_on_alone(llamas, implementation, way, changes, tmp_path):
    net, cache = llamas[implementation], exact(**changes)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        other = COPIES[way](cache, tmp_path)
        assert other.settings == cache.settings
        assert other.nbytes() <= cache.nbytes()
        a = [net(IDS[:, k : k + 1], past_key_values=cache).logits for k in range(10)]
        assert other.get_seq_length() == 40
        b = [net(IDS[:, k : k + 1], past_key_values=other).logits for k in range(10)]
    assert compressed(cache)
    torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=0, atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("amount", [-1, -9, -30, torch.tensor(-9), 31, 40, 100, 0, 3, -40])
def test_crop_in_all_its_forms(llamas, implementation, amount):
    net, cache, plain = llamas[implementation], exact(), DynamicCache()
    left = min(int(amount), 40) if amount > 0 else 40 + int(amount)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        cache.crop(amount)
        assert cache.get_seq_length() == left
        assert all(layer.get_mask_sizes(2) == (left + 2, 0) for layer in cache.layers)
        if left:
            net(IDS[:, :left], past_key_values=plain)
        ours, theirs = (net(IDS[:, 7:17], past_key_values=c).logits for c in (cache, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@IMPLEMENTATIONS
def test_rows_of_the_batch_repeated_selected_and_reordered(llamas, implementation):
    net = llamas[implementation]
    caches = exact(), DynamicCache()
    with torch.no_grad():
        for cache in caches:
            net(IDS, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0, 2]))
            cache.batch_select_indices(torch.tensor([True, True, False]))
            cache.reorder_cache(torch.tensor([1, 1]))
        ours, theirs = (net(IDS[:, :3], past_key_values=cache).logits for cache in caches)
    assert compressed(caches[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_implementation_may_change_in_the_middle(llamas):
    net, cache, plain = tiny("llama", "sdpa"), exact(), DynamicCache()
    with torch.no_grad():
        for step, name in enumerate(("sdpa", "lowrank", "eager", "lowrank")):
            net.set_attn_implementation(name)
            ours = net(IDS[:, step * 10 : step * 10 + 10], past_key_values=cache).logits
            net.set_attn_implementation("sdpa")
            theirs = net(IDS[:, step * 10 : step * 10 + 10], past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert compressed(cache)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "changes", [{}, {"rope": "after"}, {"joint": False}, {"dtype": torch.int8}, {"value_rank": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_below_full_rank_the_prompt_is_exact_and_decoding_sees_what_is_stored(kind, implementation, changes):
    plain_name = "eager" if kind == "gpt_oss" else "sdpa"
    net = tiny(kind, "lowrank" if implementation == "lowrank" else plain_name)
    cache, plain = exact(**{"rank": 5, **changes}), DynamicCache()
    with torch.no_grad():
        ours = net(IDS, past_key_values=cache).logits
        stored = [layer.kv.dense() for layer in cache.layers]
        decoded = net(IDS[:, :3], past_key_values=cache).logits
        net.set_attn_implementation(plain_name)
        torch.testing.assert_close(ours, net(IDS, past_key_values=plain).logits, rtol=0, atol=1e-5)
        lossy = 0.0
        for layer, (keys, values) in zip(plain.layers, stored, strict=True):
            lossy = max(lossy, float((layer.keys - keys).abs().max()))
            layer.keys, layer.values = keys, values
        expected = net(IDS[:, :3], past_key_values=plain).logits
    assert compressed(cache)
    assert lossy > 1e-3
    torch.testing.assert_close(decoded, expected, rtol=0, atol=2e-5)


def test_the_rotation_is_taken_off_before_compressing():
    """Constant keys under RoPE have rank two a pair; without it they are one point."""
    net = tiny("llama", "lowrank")
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.k_proj.weight[:] = layer.self_attn.k_proj.weight[:1]
        losses = {}
        for rope in ("before", "after"):
            cache, plain = exact(rank=1, rope=rope, joint=False), DynamicCache()
            for one in (cache, plain):
                net(ONE, past_key_values=one)
            found = cache.layers[0].kv.dense()[0]
            losses[rope] = float((found - plain.layers[0].keys).norm() / plain.layers[0].keys.norm())
    assert losses["before"] < 1e-5
    assert losses["after"] > 0.1


@IMPLEMENTATIONS
def test_gradients_reach_the_keys(llamas, implementation):
    found = []
    for cache in (exact(), DynamicCache()):
        net = copy.deepcopy(llamas[implementation])
        net(IDS, past_key_values=cache).logits.square().sum().backward()
        assert cache.get_seq_length() == 40
        found.append(net.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_rebuilding_is_said_once(llamas):
    cache = exact()
    with pytest.warns(UserWarning, match="set_attn_implementation") as caught:
        llamas["sdpa"].generate(ONE, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert len([w for w in caught if "LowRankCache" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llamas["lowrank"].generate(ONE, past_key_values=exact(), max_new_tokens=4, do_sample=False)


def test_bytes_are_all_bytes_with_the_table_once():
    net = tiny("llama", "lowrank", num_hidden_layers=3)
    cache = exact()
    net.generate(ONE, past_key_values=cache, max_new_tokens=4, do_sample=False)
    layers = sum(layer.kv.nbytes() for layer in cache.layers)
    assert cache.nbytes() == layers + cache.layers[0].kv.rotation.nbytes()
    assert len({id(layer.kv.rotation) for layer in cache.layers}) == 1
    assert cache.is_filled()
    assert not lr.LowRankCache().is_filled()


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "LowRankCache" in dir(lr)
    assert "LowRankCache" in lr.__all__
    with pytest.raises(lr.MissingExtraError, match=r"lowrank-layers\[transformers\]"):
        lr.LowRankCache  # noqa: B018
