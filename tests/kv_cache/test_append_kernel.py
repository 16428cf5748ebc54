"""A token appended in one compiled function is that of torch, and nothing is written where the function stands back."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache.append_kernel import append_token
from lowrank_layers.kv_cache.compiled_functions import compiled_functions
from lowrank_layers.kv_cache.recent_tokens import RecentTokens

SHAPES = (2, 3, 1, 8), (2, 3, 1, 5)


@pytest.fixture(autouse=True)
def _seed():
    if compiled_functions() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


def recent_with(tokens=4, room=6):
    pair = []
    for batch, heads, _, size in SHAPES:
        held = RecentTokens(torch.empty(batch, heads, 1, size), room)
        held.append(torch.randn(batch, heads, tokens, size))
        pair.append(held)
    return pair[0], pair[1]


def a_token():
    # as a projection gives it: heads of one token are not apart in memory
    return [torch.randn(batch, 1, heads, size).transpose(1, 2) for batch, heads, _, size in SHAPES]


def test_it_is_what_append_writes():
    recent, (keys, values) = recent_with(), a_token()
    expected = [torch.cat([held.read(), x], 2) for held, x in zip(recent, (keys, values), strict=True)]
    assert append_token(recent, keys, values)
    assert all(torch.equal(held.read(), x) for held, x in zip(recent, expected, strict=True))


def not_finite(number, side):
    given = a_token()
    given[side][1, 2, 0, 4] = number
    return given


STANDS_BACK = {
    "NaN": lambda: not_finite(float("nan"), 0),
    "infinity": lambda: not_finite(float("inf"), 1),
    "minus infinity": lambda: not_finite(-float("inf"), 0),
    "two tokens": lambda: [x.repeat(1, 1, 2, 1) for x in a_token()],
    "another batch": lambda: [x[:1] for x in a_token()],
    "fp64": lambda: [x.double() for x in a_token()],
    "a gradient": lambda: [x.requires_grad_() for x in a_token()],
    "steps between entries": lambda: [x.repeat_interleave(2, 3)[..., ::2] for x in a_token()],
}


@pytest.mark.parametrize("case", STANDS_BACK)
def test_where_it_stands_back(case):
    recent = recent_with()
    before = [held.buffer[:, :, :4].clone() for held in recent]
    assert not append_token(recent, *STANDS_BACK[case]())
    assert [held.tokens for held in recent] == [4, 4]
    assert all(torch.equal(held.read(), x) for held, x in zip(recent, before, strict=True))


def test_a_copy_has_tokens_of_its_own():
    recent, tokens = recent_with(room=8), [a_token() for _ in range(2)]
    assert append_token(recent, *tokens[0])
    copied = copy.deepcopy(recent)
    before = [held.read().clone() for held in recent]
    assert append_token(copied, *tokens[1])
    assert [held.tokens for held in recent] == [5, 5]
    assert all(torch.equal(held.read(), x) for held, x in zip(recent, before, strict=True))
    for held, old, new in zip(copied, before, tokens[1], strict=True):
        assert torch.equal(held.read(), torch.cat([old, new], 2))


def test_what_was_made_in_inference_mode_is_not_written_outside():
    with torch.inference_mode():
        recent = recent_with(room=8)
        assert append_token(recent, *a_token())
    assert not append_token(recent, *a_token())
    assert [held.tokens for held in recent] == [5, 5]


def test_a_buffer_that_is_replaced_is_freed():
    recent = recent_with(room=8)
    assert append_token(recent, *a_token())
    former = [weakref.ref(held.buffer) for held in recent]
    for held in recent:
        held.drop(2)
    assert [x() for x in former] == [None, None]


def test_without_room_it_stands_back():
    recent = recent_with(tokens=6)
    assert not append_token(recent, *a_token())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_cache_refuses_it_as_ever(number):
    kv = lr.LowRankKV(lr.KVSettings(), lr.Rotation.of(8))
    kv.append(torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8))
    kv.compress()
    assert kv.compressed
    keys = torch.randn(1, 2, 1, 8)
    keys[0, 1, 0, 3] = number
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        kv.append(keys, torch.randn(1, 2, 1, 8))
    assert len(kv) == 60
