"""Eight prompts of different lengths, padded on the left: each row of the batch gets what it gets alone."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import lowrank_layers as lr
from lowrank_layers.kv_cache.rope import TILE_FRAME

from .caches import IMPLEMENTATIONS, WARNINGS, compressed, exact, through_a_file
from .tiny_models import peaked

pytestmark = WARNINGS
LENGTHS = (44, 30, 60, 21, 53, 28, 37, 48)
PROMPTS = [
    torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
]
IDS = torch.tensor([[0] * (max(LENGTHS) - len(prompt)) + prompt for prompt in PROMPTS])
MASK = (IDS > 0).long()
TOKENS = 14
SETTINGS = {
    "low rank": {"rank": 5},
    "per head, rotated": {"rank": 5, "rope": "after", "joint": False},
    "int8": {"rank": 5, "dtype": torch.int8},
    "no first tokens": {"rank": 5, "keep_first": 0},
    "keys in their tile's frame": {"rank": 5, "rope": "tile"},
    "calibrated bits": {"rank": None, "bits": 3.0},
    "calibrated bits, keys before RoPE": {"rank": None, "bits": 3.0, "rope": "before"},
}
TILED = ("keys in their tile's frame", "calibrated bits")
"""Tiles are counted in the cache: only a row behind padding of whole tiles is exactly what it is alone."""


def net_of(kind, implementation):
    net = peaked(kind)
    net.set_attn_implementation(implementation)
    return net


def answers(net, cache, ids=IDS, mask=MASK, **options):
    found = net.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=TOKENS, do_sample=False, **options
    )
    return found[:, ids.shape[1] :]


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox", "cohere"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 17}], ids=str)
def test_at_full_rank_the_rows_are_those_of_the_exact_cache(kind, implementation, options):
    net, cache = net_of(kind, implementation), exact()
    found = answers(net, cache, **options)
    net.set_attn_implementation("sdpa")
    assert torch.equal(found, answers(net, DynamicCache(), **options))
    assert compressed(cache)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", SETTINGS)
def test_at_low_rank_each_row_gets_what_it_gets_alone(name, implementation):
    net, changes = net_of("llama", implementation), SETTINGS[name] | {"refresh": None}
    if "calibrated" in name:
        settings = lr.KVSettings(bits=3.0, keep_first=2, rope=changes.get("rope"))
        changes["subspaces"] = lr.calibrate_kv(net_of("llama", "sdpa"), [IDS[2:3], IDS[4:5, 7:]], settings)
    cache = exact(**changes)
    rows = answers(net, cache)
    assert compressed(cache)
    assert not torch.equal(rows, answers(net, DynamicCache()))
    for row, prompt in zip(rows, PROMPTS, strict=True):
        if name in TILED and (max(LENGTHS) - len(prompt)) % TILE_FRAME:
            continue
        ids = torch.tensor([prompt])
        assert torch.equal(row, answers(net, exact(**changes), ids, torch.ones_like(ids))[0])


@IMPLEMENTATIONS
@pytest.mark.parametrize("way", ["copy", "file"])
def test_copies_keep_the_padding(way, implementation, tmp_path):
    net, cache = net_of("llama", implementation), exact(rank=5)
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        net(IDS, attention_mask=MASK, position_ids=positions, past_key_values=cache)
        other = copy.deepcopy(cache) if way == "copy" else through_a_file(cache, tmp_path)
        more = torch.cat([MASK, MASK.new_ones(8, 3)], 1)
        inputs = {"attention_mask": more, "position_ids": positions[:, -1:] + torch.arange(1, 4)}
        ours, theirs = (net(IDS[:, -3:], past_key_values=c, **inputs).logits for c in (cache, other))
    assert torch.equal(ours, theirs)
    assert torch.equal(other.layers[0].kv.padding.starts.index, max(LENGTHS) - torch.tensor(LENGTHS))


def test_a_file_whose_padding_does_not_fit_is_refused(tmp_path):
    cache, path = exact(rank=5), tmp_path / "cache.safetensors"
    with torch.no_grad():
        net_of("llama", "lowrank")(IDS, attention_mask=MASK, past_key_values=cache)
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert tensors["1.keep"].shape == IDS.shape
    for other in (tensors["1.keep"][1:].clone(), tensors["1.keep"].long(), tensors["1.keep"][0].clone()):
        save_file(tensors | {"1.keep": other}, path, metadata=metadata)
        with pytest.raises(lr.CheckpointError, match="padding does not fit"):
            lr.LowRankCache.load(path)


@IMPLEMENTATIONS
def test_a_budget_counts_what_says_where_padding_is(implementation):
    net, cache, plain = net_of("llama", implementation), exact(budget=0.7), DynamicCache()
    with torch.no_grad():
        for each in (cache, plain):
            net(IDS, attention_mask=MASK, past_key_values=each)
        whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
        net(IDS[:, :1], attention_mask=torch.cat([MASK, MASK[:, -1:]], 1), past_key_values=cache)
    assert compressed(cache)
    assert cache.layers[0].kv.padding.keep is not None
    assert sum(layer.kv.nbytes() for layer in cache.layers) <= 0.7 * whole


def test_what_an_encoder_pads_does_not_count():
    """A mask that hides the last tokens: cross-attention's."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 40, 3) @ torch.randn(2, 1, 1, 3, 16)
    keys[1, :, 25:], values[1, :, 25:] = 100 * torch.randn(2, 2, 15, 16)
    kv = lr.LowRankKV(rank=3, keep_recent=5, keep_first=2, block=4)
    kv.append(keys, values)
    mask = (torch.arange(40) < torch.tensor([40, 25])[:, None])[:, None, None]
    kv.hide(mask)
    kv.compress()
    for ours, theirs in zip(kv.dense(), (keys, values), strict=True):
        torch.testing.assert_close(ours[1, :, :25], theirs[1, :, :25], rtol=0, atol=1e-4)
