"""One step in one compiled function equals the same step in operations of torch, and stands back where it must."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache import decode_step
from lowrank_layers.kv_cache.compiled_functions import compiled_functions

from .packed import weight_bound_of_attention

CASES = {
    "joint heads": (lr.Rotation.of(16), {}, (1, 3, 16, 16), 9),
    "a batch": (lr.Rotation.of(16), {}, (3, 2, 16, 16), 2),
    "values of another size": (lr.Rotation.of(16), {}, (2, 2, 16, 24), 6),
    "interleaved pairs": (lr.Rotation.of(16, interleaved=True), {}, (2, 3, 16, 16), 3),
    "part of a head rotated": (lr.Rotation.of(8, start=4), {}, (1, 2, 16, 16), 4),
    "no first tokens": (lr.Rotation.of(16), {"keep_first": 0}, (1, 2, 16, 16), 4),
    "no recent tokens but the last": (lr.Rotation.of(16), {"keep_recent": 0, "block": 1}, (1, 2, 16, 16), 4),
    "few bits": (lr.Rotation.of(16), {"bits": 0.8}, (1, 2, 16, 16), 4),
}


@pytest.fixture(autouse=True)
def _seed():
    if compiled_functions() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


def filled(rotation, settings, shape, tokens):
    batch, heads, size, value_size = shape
    kv = lr.LowRankKV(lr.KVSettings(**settings), rotation)
    for count in (tokens - 1, 1):
        kv.append(torch.randn(batch, heads, count, size), torch.randn(batch, heads, count, value_size) + 0.5)
        if count > 1:
            kv.compress()
    return kv


def in_torch(kv, query, **options):
    with mock.patch.object(decode_step, "attention", return_value=None):
        return kv.attend(query, **options)


@pytest.mark.parametrize("tokens", [90, 700, 2600])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_torch(case, tokens):
    rotation, settings, shape, query_heads = CASES[case]
    kv = filled(rotation, settings, shape, tokens)
    query = 2 * torch.randn(shape[0], query_heads, 1, shape[2])
    with mock.patch.object(decode_step, "attention", wraps=decode_step.attention) as spy:
        found = kv.attend(query, scale=0.3)
    assert spy.call_count == 1
    expected = in_torch(kv, query, scale=0.3)
    bound = weight_bound_of_attention(kv, query, 0.3)
    assert ((found - expected).abs() <= bound + 1e-5 + 1e-4 * expected.abs()).all()
    assert not torch.equal(found, expected), "it was not compiled"


def test_scores_of_any_size():
    kv = filled(lr.Rotation.of(16), {}, (1, 2, 16, 16), 300)
    for factor in (0.0, 1e-3, 30.0, 1e4):
        query = factor * torch.randn(1, 4, 1, 16)
        torch.testing.assert_close(kv.attend(query), in_torch(kv, query), rtol=1e-3, atol=1e-3)


def test_the_number_of_threads_does_not_matter():
    kv, before = filled(lr.Rotation.of(16), {}, (2, 2, 16, 16), 1200), torch.get_num_threads()
    query, found = torch.randn(2, 4, 1, 16), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(kv.attend(query))
    finally:
        torch.set_num_threads(before)
    bound = 2 * weight_bound_of_attention(kv, query, 0.25)
    for other in found[1:]:
        assert ((other - found[0]).abs() <= bound + 1e-5).all()


def test_where_it_does_not_serve():
    kv = filled(lr.Rotation.of(16), {}, (1, 2, 16, 16), 300)
    query = torch.randn(1, 4, 1, 16)
    learning = query.clone().requires_grad_()
    hidden = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    hidden[..., 5:50] = False
    for given, options in (
        (torch.randn(1, 4, 2, 16), {}),
        (query, {"mask": hidden}),
        (query, {"softcap": 1.0}),
        (query, {"sinks": torch.zeros(4)}),
        (learning, {}),
        (query.double(), {}),
    ):
        assert torch.equal(kv.attend(given, **options), in_torch(kv, given, **options))
    apart = filled(lr.Rotation.of(16), {"joint": False}, (1, 2, 16, 16), 300)
    assert torch.equal(apart.attend(query), in_torch(apart, query))
    kv.attend(learning).sum().backward()
    assert learning.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert kv.attend(query).dtype == torch.bfloat16
