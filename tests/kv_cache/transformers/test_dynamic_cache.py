"""LowRankCache in the hands of code that was written for DynamicCache."""

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr

from .caches import IDS, IMPLEMENTATIONS as BOTH, KEEP, WARNINGS
from .tiny_models import tiny

pytestmark = WARNINGS


def filled(implementation, rank=16, **changes):
    net, caches = tiny("llama", implementation, **changes), (lr.LowRankCache(rank, **KEEP), DynamicCache())
    with torch.no_grad():
        for cache in caches:
            net(IDS, past_key_values=cache)
    return net, *caches


@BOTH
def test_keys_and_values_of_a_layer_are_tensors(implementation):
    _, ours, theirs = filled(implementation)
    assert isinstance(ours, DynamicCache)
    assert ours.layers[0].compressed > 0
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        for found, expected in ((mine.keys, layer.keys), (mine.values, layer.values)):
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert found.numpy().shape == expected.shape
    empty = lr.LowRankCache(config=tiny("llama").config)
    assert [layer.keys for layer in empty.layers] == [layer.values for layer in empty.layers] == [None, None]


@BOTH
def test_a_loop_over_the_cache_makes_a_dynamic_cache_of_it(implementation):
    net, ours, theirs = filled(implementation)
    assert len(list(ours)) == len(ours) == 2
    for (keys, values, _), (their_keys, their_values, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(keys, their_keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(values, their_values, rtol=0, atol=1e-5)
    copied = DynamicCache(list(ours))
    with torch.no_grad():
        a, b = (net(IDS[:, :3], past_key_values=cache).logits for cache in (copied, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_below_full_rank_they_are_what_attention_sees():
    _, ours, theirs = filled("lowrank", rank=4)
    for layer, exact in zip(ours.layers, theirs.layers, strict=True):
        keys, values = layer.kv.dense()
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert float((keys - exact.keys).abs().max()) > 1e-3


def test_what_is_read_does_not_change_with_the_cache():
    net, ours, _ = filled("lowrank")
    keys = ours.layers[0].keys
    before = keys.clone()
    with torch.no_grad():
        ours.crop(-5)
        net(IDS[:, :7], past_key_values=ours)
    assert torch.equal(keys, before)
    keys.zero_()
    assert float(ours.layers[0].keys.abs().max()) > 0


def test_other_keys_in_place_of_a_layers_are_refused():
    _, ours, _ = filled("lowrank")
    before = ours.layers[0].keys
    with pytest.raises(lr.LowRankError, match="DynamicCache"):
        ours.layers[0].keys = before[:, :, ::2]
    with pytest.raises(lr.LowRankError, match="crop"):
        ours.layers[0].values = before
    assert torch.equal(ours.layers[0].keys, before)
