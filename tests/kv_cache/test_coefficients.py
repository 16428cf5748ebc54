"""Ways of storing coefficients: what the library has, and one more of two methods, through the whole of a cache."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers.kv_cache import coefficients, fit, serialize
from lowrank_layers.kv_cache.coefficients import Coefficients

SETTINGS = lr.KVSettings(rank=4, keep_recent=8, keep_first=3, block=16, dtype=torch.int8)
"""A user's int8 stands for the way that is tested."""


class Nibbles(Coefficients):
    """Four bits per coefficient, two of neighbouring directions in a byte, and a step per token and group."""

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        steps = (values.abs().amax(2) / 7).clamp_min(1e-6)
        levels = (values / steps[:, :, None]).round().clamp(-7, 7).to(torch.int8) + 8
        return {"pairs": levels[:, :, 0::2] * 16 + levels[:, :, 1::2], "steps": steps}

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        pairs = codes["pairs"].to(torch.uint8)
        levels = torch.stack([pairs // 16, pairs % 16], 3).flatten(2, 3).to(dtype) - 8
        return levels * codes["steps"][:, :, None].to(dtype)


@pytest.fixture
def nibbles(monkeypatch):
    """The library, with int8 stored in four bits."""
    for module in (fit, serialize):
        monkeypatch.setattr(module, "coefficients_for", Nibbles)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 2, 4, count, 16, generator=torch.Generator().manual_seed(seed))
    return x[0], x[1]


def filled(count: int = 200, **changes: object) -> lr.LowRankKV:
    cache = lr.LowRankKV(SETTINGS, lr.Rotation.of(16), **changes)
    cache.append(*tokens(count))
    cache.compress()
    return cache


@pytest.mark.usefixtures("nibbles")
@pytest.mark.parametrize("joint", [True, False])
def test_a_way_of_storing_is_two_methods(joint, monkeypatch):
    cache = filled(joint=joint)
    for count in (1, 30, 1):  # grows block by block
        cache.append(*tokens(count, seed=count))
        cache.compress()
    store = cache.old[1].parts[0].coefficients
    assert isinstance(store, Nibbles)
    assert store.tokens == cache.compressed > 200
    query = torch.randn(2, 8, 1, 16)
    dense = cache.dense()
    expected = F.scaled_dot_product_attention(query, *dense, enable_gqa=True)
    torch.testing.assert_close(cache.attend(query), expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(coefficients, "RUN", 64)  # the tokens in several runs
    torch.testing.assert_close(cache.attend(query), expected, atol=1e-5, rtol=1e-4)
    again = serialize.layer_from_tensors(*serialize.layer_to_tensors(cache), cache.settings, cache.rotation)
    assert all(torch.equal(a, b) for a, b in zip(again.dense(), dense, strict=True))
    cache.repeat(2)
    cache.select(torch.tensor([3, 0]))
    cache.crop(150)
    for side, whole in zip(cache.dense(), dense, strict=True):
        torch.testing.assert_close(side, whole.repeat_interleave(2, 0)[[3, 0], :, :150], atol=1e-6, rtol=1e-6)


def test_fewer_bits_are_fewer_bytes_and_more_error(request):
    eight = filled()
    request.getfixturevalue("nibbles")
    four = filled()
    assert four.nbytes() < eight.nbytes()
    errors = [float((cache.dense()[1] - tokens(200)[1]).norm()) for cache in (eight, four)]
    assert errors[0] < errors[1] < 2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_products_with_coefficients_are_products_with_what_is_read(dtype, monkeypatch):
    monkeypatch.setattr(coefficients, "RUN", 64)
    store = coefficients.coefficients_for(dtype)
    for count in (100, 1, 99):
        store.append(torch.randn(2, 3, 5, count))
    read = store.read(0, 200, torch.float32)
    rows, shift, weights = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 7, 1), torch.rand(2, 3, 7, 200)
    torch.testing.assert_close(store.scores(rows, shift), rows @ read + shift, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(store.mixed(weights), weights @ read.mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(store.read(150, 160, torch.float32), read[..., 150:160])


def test_int8_is_off_by_at_most_half_a_step():
    store = coefficients.coefficients_for(torch.int8)
    values = torch.randn(2, 3, 5, 200)
    store.append(values)
    steps = values.abs().amax(2, keepdim=True) / 127
    assert bool(((store.read(0, 200, torch.float32) - values).abs() <= steps * 0.501).all())
    zeros = coefficients.coefficients_for(torch.int8)
    zeros.append(torch.zeros(1, 1, 5, 3))
    assert not zeros.read(0, 3, torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tokens_are_appended_in_place_into_room_that_counts(dtype):
    store, values, places = coefficients.coefficients_for(dtype), torch.randn(2, 3, 5, 4000), set()
    store.append(values[..., :1000])
    assert not sum(t.nbytes for name, t in store.tensors() if name.endswith(".room"))
    for at in range(1000, 4000, 4):
        store.append(values[..., at : at + 4])
        places.add(store.codes["values"].data_ptr())
        assert len({code.stride(-2) for code in store.codes.values()}) == 1
        assert all(code.shape[-1] == store.tokens == at + 4 for code in store.codes.values())
    at_once = coefficients.coefficients_for(dtype)
    at_once.append(values)
    assert all(torch.equal(code, at_once.codes[name]) for name, code in store.codes.items())
    # by 64 up to 2,048 tokens, and by 1/32 from then on
    assert len(places) <= 1048 // 64 + 1 + 22
    stored = sum(t.nbytes for _, t in store.tensors())
    assert stored == sum(code.untyped_storage().nbytes() for code in store.codes.values())
    assert stored <= (1 + coefficients.ROOM_PART) * sum(t.nbytes for _, t in at_once.tensors())


def test_tokens_from_inference_mode_grow_outside_of_it():
    with torch.inference_mode():
        store = coefficients.coefficients_for(torch.int8)
        store.append(torch.full((1, 1, 3, 10), 127.0))
        store.append(torch.full((1, 1, 3, 2), 127.0))
    store.append(torch.full((1, 1, 3, 2), 127.0))
    assert store.tokens == 14
    assert bool((store.read(0, 14, torch.float32) == 127).all())


def test_what_is_cut_off_takes_no_memory():
    store = coefficients.coefficients_for(torch.int8)
    store.append(torch.randn(1, 1, 1, 1000))
    store.truncate(10)
    assert all(code.untyped_storage().nbytes() == code.nbytes for code in store.codes.values())
