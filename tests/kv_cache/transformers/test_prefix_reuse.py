"""A prompt that several requests share is read once: what each request then gets, and what is left of it."""

import copy

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr
from lowrank_layers.kv_cache import decode_kernel

from .caches import IMPLEMENTATIONS, WARNINGS, compressed, exact, through_a_file
from .tiny_models import peaked

pytestmark = WARNINGS
PROMPT = torch.randint(3, 96, (1, 50), generator=torch.Generator().manual_seed(2))
REQUESTS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(4))
SETTINGS = {
    "full rank": {},
    "low rank": {"rank": 5},
    "per head, rotated": {"rank": 5, "rope": "after", "joint": False},
    "int8": {"rank": 5, "dtype": torch.int8},
    "rule": {"rank": lr.Energy(0.9)},
    "budget": {"budget": 0.8},
    "bits": {"rank": None, "bits": 3.0},
    "bits before RoPE, per head": {"rank": None, "bits": 3.0, "rope": "before", "joint": False},
}
WAYS = {"copy": lambda cache, folder: copy.deepcopy(cache), "file": through_a_file}


@pytest.fixture(scope="module")
def nets():
    found = {}
    for name in ("lowrank", "sdpa"):
        found[name] = peaked("llama")
        found[name].set_attn_implementation(name)
    return found


def read(net, cache):
    """The cache with the prompt in it, a budget shared."""
    with torch.no_grad():
        net(PROMPT, past_key_values=cache)
        if getattr(cache, "budget", None) is not None:  # at the second step
            net(PROMPT[:, :1], past_key_values=cache)
            cache.crop(-1)
    return cache


def served(net, cache, request, tokens=16):
    """The tokens that answer a request, which follows the prompt."""
    whole = torch.cat([PROMPT.expand(len(request), -1), request], 1)
    return net.generate(whole, past_key_values=cache, max_new_tokens=tokens, do_sample=False)[:, whole.shape[1] :]


@IMPLEMENTATIONS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_request_gets_what_a_new_cache_gives_in_the_same_steps(nets, implementation, name, way, tmp_path):
    net, changes = nets[implementation], SETTINGS[name]
    prompt = read(net, exact(**changes))
    for request in REQUESTS[:, None]:
        alone = read(net, exact(**changes))
        cache = WAYS[way](prompt, tmp_path)
        assert torch.equal(served(net, cache, request), served(net, alone, request))
        ours, theirs = (dict(each.tensors()) for each in (cache, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.endswith(("tail", "room")))
    assert compressed(prompt)
    assert prompt.get_seq_length() == PROMPT.shape[1]


@IMPLEMENTATIONS
def test_at_full_rank_that_is_what_the_exact_cache_gives_in_one_step(nets, implementation):
    net = nets[implementation]
    prompt = read(net, exact())
    for request in REQUESTS[:, None]:
        found = served(net, copy.deepcopy(prompt), request)
        assert torch.equal(found, served(net, DynamicCache(), request))


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", SETTINGS)
def test_requests_side_by_side_get_what_each_gets_alone(nets, implementation, name):
    """Without fitting again, which looks at the whole batch."""
    net, changes = nets[implementation], SETTINGS[name] | {"refresh": None}
    prompt = read(net, exact(**changes))
    together = copy.deepcopy(prompt)
    together.batch_repeat_interleave(len(REQUESTS))
    rows = served(net, together, REQUESTS)
    assert compressed(together)
    for row, request in zip(rows, REQUESTS, strict=True):
        assert torch.equal(row, served(net, copy.deepcopy(prompt), request[None])[0])


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", SETTINGS)
def test_back_at_the_prompt_a_cache_that_compressed_nothing_since_is_as_it_was(nets, implementation, name):
    net, changes = nets[implementation], SETTINGS[name]
    cache = read(net, exact(**changes, block=20))
    kept = copy.deepcopy(cache)
    for request in REQUESTS[:, None]:
        expected = served(net, copy.deepcopy(kept), request, tokens=8)
        assert torch.equal(served(net, cache, request, tokens=8), expected)
        assert cache.layers[0].compressed == kept.layers[0].compressed > 0
        cache.crop(PROMPT.shape[1])


@pytest.mark.parametrize("name", SETTINGS)
def test_back_at_the_prompt_what_was_compressed_since_stays_so(nets, name, monkeypatch):
    monkeypatch.setattr(decode_kernel, "compiled_functions", lambda: None)  # their 16 bits would be all that is seen
    net, cache = nets["lowrank"], exact(**SETTINGS[name], refresh=None)
    served(net, read(net, cache), REQUESTS[:1], tokens=24)
    held = [[side[:, :, : PROMPT.shape[1]] for side in layer.kv.dense()] for layer in cache.layers]
    cache.crop(PROMPT.shape[1])
    assert [layer.compressed for layer in cache.layers] == [PROMPT.shape[1] - 2] * len(cache.layers)
    plain = read(net, DynamicCache())
    for layer, kept, (keys, values) in zip(cache.layers, plain.layers, held, strict=True):
        for side, expected in zip(layer.kv.dense(), (keys, values), strict=True):
            torch.testing.assert_close(side, expected, rtol=0, atol=1e-6)
        kept.keys, kept.values = keys, values
    with torch.no_grad():
        ours, theirs = (net(REQUESTS[1:2], past_key_values=each).logits for each in (cache, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
