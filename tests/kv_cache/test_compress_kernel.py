"""The compiled function compresses tokens as operations of torch do, and stands back where it does not serve."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache import compress_kernel
from lowrank_layers.kv_cache.bit_planes import unpacked
from lowrank_layers.kv_cache.bit_subspace import bit_subspaces
from lowrank_layers.kv_cache.compiled_functions import compiled_functions
from lowrank_layers.kv_cache.compressed_tokens import HeadGroups
from lowrank_layers.kv_cache.leaving_tokens import LeavingTokens
from lowrank_layers.kv_cache.tile_frame import TileFrame
from lowrank_layers.kv_cache.transform import Transform

SIZE, FIRST = 16, 5
ROTATIONS = {
    "values": None,
    "halves": lr.Rotation.of(SIZE),
    "interleaved": lr.Rotation.of(SIZE, interleaved=True),
    "part of a head": lr.Rotation.of(8, start=4),
}
CASES = {
    "a prompt": (1, 2, 1, 0, 700, (3, 6, 0, 8, 8), False),
    "a prompt in a metric": (2, 2, 1, 0, 300, (3, 6, 8, 8, 0), True),
    "few tokens": (1, 3, 1, 61, 4, (4, 8, 8, 12, 16), False),
    "few tokens, bases of their own, in a metric": (2, 2, 2, 40, 4, (2, 6, 8, 4, 8), True),
    "over the end of tiles": (2, 1, 2, 30, 37, (1, 2, 8, 4, 0), False),
    "one token": (1, 2, 1, 95, 1, (0, 2, 0, 12, 8), True),
}
"""Batch, heads, batch of the bases, tokens before, tokens, widths, whether there is a metric."""


def _case(rotation, case, *, shared=False):
    batch, heads, bases, held, count, widths, measured = CASES[case]
    width, rotation = heads * SIZE, ROTATIONS[rotation]
    moment = torch.randn(bases, 1, width, width) * torch.logspace(0, -1.5, width)
    metric = torch.randn(1, 1, width, width) / width**0.5
    transform = Transform.fit(
        torch.randn(bases, 1, width), moment @ moment.mT, metric @ metric.mT + torch.eye(width) if measured else None
    )
    frame = None if rotation is None else TileFrame(rotation, SIZE)
    ((subspace, store),) = bit_subspaces(transform, [widths], frame, shared=shared)
    part = HeadGroups(slice(None), SIZE, subspace, store)
    rows = (torch.randn(batch, 1, held + count, width) @ moment.mT + transform.mean[:, :, None]) * (
        2.0 ** torch.randint(-2, 3, (held + count, 1))
    )
    plain = rows.unflatten(3, (heads, SIZE)).transpose(2, 3).flatten(1, 2)
    exact = plain if rotation is None else rotation.turn(plain, torch.arange(FIRST, FIRST + held + count))
    if held:
        part.extend(LeavingTokens(exact[:, :, :held], rotation, FIRST), None)
    # tokens in a buffer with room for more
    return part, LeavingTokens(torch.cat([exact, exact], 2)[:, :, held : held + count], rotation, FIRST + held)


@pytest.fixture(autouse=True)
def _seed():
    if compiled_functions() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


def _by_torch(part, tokens, looked_at, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compress_kernel, "applies", lambda *_: False)
        return _added(part, tokens, looked_at)


def _added(part, tokens, looked_at):
    """The codes that a copy gets, the energy that is lost, and all of it."""
    other, held = copy.deepcopy(part), part.coefficients.tokens
    lost, whole = other.add(tokens, looked_at)
    assert other.coefficients.tokens == held + tokens.exact.shape[2]
    codes = other.coefficients.codes
    assert all(torch.equal(codes[name][..., :held], code) for name, code in part.coefficients.codes.items())
    return {name: code[..., held:] for name, code in codes.items()}, lost, whole


@pytest.mark.parametrize(("rotation", "case"), list(product(ROTATIONS, CASES)))
def test_codes_and_energies_are_those_of_torch_but_for_rounding(rotation, case, monkeypatch):
    part, tokens = _case(rotation, case)
    looked_at = slice(0, tokens.exact.shape[2])
    assert compress_kernel.applies(tokens, part.subspace, part.coefficients)
    codes, lost, whole = _added(part, tokens, looked_at)
    expected, lost_too, whole_too = _by_torch(part, tokens, looked_at, monkeypatch)
    assert whole == pytest.approx(whole_too, rel=1e-4)
    assert lost == pytest.approx(lost_too, rel=1e-2)
    assert list(codes) == list(expected)
    assert all(codes[name].shape == code.shape for name, code in expected.items())
    # a level at the edge of another may be rounded either way, and so may a gain be chosen
    same = (codes["gains"] == expected["gains"])[:, :, None]
    assert float(same.float().mean()) > 0.97
    widths = part.coefficients.widths
    apart = (unpacked(codes, widths).int() - unpacked(expected, widths).int()).abs() * same
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 0.01


@pytest.mark.parametrize("case", CASES)
def test_directions_of_the_model_lose_what_they_lose_in_torch(case, monkeypatch):
    part, tokens = _case("halves", case, shared=True)
    looked_at = slice(0, tokens.exact.shape[2])
    found = _added(part, tokens, looked_at)[1:]
    assert found == pytest.approx(_by_torch(part, tokens, looked_at, monkeypatch)[1:], rel=1e-3)


def test_the_tokens_that_are_looked_at_are_those_asked_for(monkeypatch):
    part, tokens = _case("halves", "a prompt")
    found = _added(part, tokens, slice(128, 384))[1:]
    assert found == pytest.approx(_by_torch(part, tokens, slice(128, 384), monkeypatch)[1:], rel=1e-2)
    assert _added(part, tokens, slice(0, 0))[1:] == (0, 0)


@pytest.mark.parametrize("joint", [True, False])
def test_what_is_compressed_is_close_to_the_tokens(joint):
    cache = lr.LowRankKV(rotation=ROTATIONS["halves"], bits=8, joint=joint, block=4)
    keys, values = torch.randn(2, 2, 3, 400, SIZE)
    cache.append(keys[:, :, :300], values[:, :, :300])
    cache.compress()
    for at in range(300, 400):
        cache.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        cache.compress()
    assert cache.compressed > 370
    for dense, exact in zip(cache.dense(), (keys, values), strict=True):
        assert float((dense - exact).square().mean()) < 3e-4


def test_codes_may_come_in_any_order():
    part, tokens = _case("halves", "few tokens")
    other = copy.deepcopy(part)
    codes = other.coefficients.codes
    other.coefficients = other.coefficients.empty()
    other.coefficients.append_codes(dict(sorted(codes.items())))
    for each in (part, other):
        each.add(tokens, slice(0, 0))
    assert all(torch.equal(other.coefficients.codes[name], code) for name, code in part.coefficients.codes.items())


def test_the_number_of_threads_does_not_matter():
    part, tokens = _case("halves", "a prompt in a metric")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(_added(part, tokens, slice(0, 300)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(code, found[1][0][name]) for name, code in found[0][0].items())
    assert found[0][1:] == pytest.approx(found[1][1:])


def test_where_it_does_not_serve():
    part, tokens = _case("halves", "few tokens")
    serves = compress_kernel.applies
    assert serves(tokens, part.subspace, part.coefficients)
    assert serves(replace(tokens, exact=tokens.exact.bfloat16()), part.subspace, part.coefficients)
    assert not serves(replace(tokens, positions=torch.zeros(1, 1, 4)), part.subspace, part.coefficients)
    assert not serves(replace(tokens, exact=tokens.exact.to("meta")), part.subspace, part.coefficients)
    assert not serves(replace(tokens, rotation=None), part.subspace, part.coefficients)
    assert not serves(tokens, replace(part.subspace, frame=None), part.coefficients)
    assert not serves(tokens, replace(part.subspace, basis=part.subspace.basis.float()), part.coefficients)
    with torch.enable_grad():
        asked = replace(tokens, exact=tokens.exact.clone().requires_grad_())
        assert not serves(asked, part.subspace, part.coefficients)
