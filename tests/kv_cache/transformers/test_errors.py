"""What a LowRankCache refuses, and that it is then as it was before."""

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr

from .caches import IDS, WARNINGS, exact
from .tiny_models import tiny

pytestmark = WARNINGS


def state(cache):
    """What is stored, without the room for more, which nothing was written to."""
    found = {name: tensor.clone() for name, tensor in cache.tensors() if not name.endswith(("tail", "room"))}
    return found | {(k, side): x for k, layer in enumerate(cache.layers) for side, x in enumerate(layer.kv.dense())}


def poisoned():
    net = tiny("llama", "lowrank", num_hidden_layers=4)
    with torch.no_grad():
        net.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    return net


BAD = {
    "rank": (lambda: tiny("llama", "lowrank"), IDS, {"rank": 17}, "at most that many"),
    "too long": (lambda: tiny("llama", "lowrank"), IDS, {"max_length": 39}, "max_length=39"),
    "NaN": (poisoned, IDS, {}, "NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_leaves_a_new_cache_new(name):
    make, ids, changes, message = BAD[name]
    cache = exact(**changes)
    with torch.no_grad(), pytest.raises(lr.LowRankError, match=message):
        make()(ids, past_key_values=cache)
    assert (len(cache.layers), cache.get_seq_length(), cache.nbytes()) == (0, 0, 0)


USED = {
    "other heads": (lambda: tiny("llama", "lowrank", num_key_value_heads=4), IDS, "belongs to one"),
    "other size": (lambda: tiny("llama", "lowrank", head_dim=32), IDS, "belongs to one"),
    "other batch": (lambda: tiny("llama", "lowrank"), IDS[:1], "belongs to one"),
    "more layers": (lambda: tiny("llama", "lowrank", num_hidden_layers=3), IDS, "belongs to one model"),
    "fewer layers": (lambda: tiny("llama", "lowrank", num_hidden_layers=1), IDS, "belongs to one model"),
    "other dtype": (lambda: tiny("llama", "lowrank").to(torch.bfloat16), IDS, "belongs to one"),
    "too long": (lambda: tiny("llama", "lowrank"), IDS.repeat(1, 3), "max_length=60"),
}


@pytest.mark.parametrize("name", USED)
def test_what_is_refused_leaves_a_used_cache_as_it_was(name):
    make, ids, message = USED[name]
    net, cache = tiny("llama", "lowrank"), exact(max_length=60)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        before = state(cache)
        with pytest.raises(lr.LowRankError, match=message):
            make()(ids, past_key_values=cache)
        after = state(cache)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        net(IDS[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 42


def test_a_fault_in_a_later_layer_is_taken_back_in_the_earlier_ones():
    good, bad = tiny("llama", "lowrank", num_hidden_layers=4), poisoned()
    cache, plain = exact(), DynamicCache()
    with torch.no_grad():
        good(IDS, past_key_values=cache)
        with pytest.raises(lr.LowRankError, match="NaN or Inf"):
            bad(IDS[:, :1], past_key_values=cache)
        assert [len(layer) for layer in cache.layers] == [40] * 4
        good(IDS, past_key_values=plain)
        ours, theirs = (good(IDS[:, 5:8], past_key_values=c).logits for c in (cache, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_no_tokens_at_all():
    cache = exact()
    with pytest.raises(lr.LowRankError, match="not empty"):
        cache.update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16), 0)
    with pytest.raises(lr.LowRankError, match="floating point"):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16).int(), 0)
    assert len(cache.layers) == 0


def test_dropout_in_training_is_refused_where_coefficients_are_read():
    net = tiny("llama", "lowrank", attention_dropout=0.1).train()
    with torch.no_grad(), pytest.raises(lr.LowRankError, match=r"model\.eval\(\)"):
        net(IDS, past_key_values=exact())


@pytest.mark.parametrize("configured", [False, True])
def test_a_compiled_model_wants_a_prompt_first(monkeypatch, configured):
    cache = exact(config=tiny("llama").config if configured else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(lr.LowRankError, match="not compiled"):
        cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
