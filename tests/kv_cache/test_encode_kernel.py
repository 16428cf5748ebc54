"""The compiled encoder gives the codes of definition, and stands back where it does not serve."""

from __future__ import annotations

import pytest
import torch

from lowrank_layers.kv_cache import encode_kernel
from lowrank_layers.kv_cache.bit_coefficients import BitCoefficients, gain_factors
from lowrank_layers.kv_cache.bit_planes import unpacked
from lowrank_layers.kv_cache.compiled_functions import compiled_functions

SHAPES = {
    "whole vectors": (1, 1, 1, 64, (3, 6, 8, 8, 16)),
    "one token, one width": (1, 1, 1, 1, (0, 0, 0, 12, 0)),
    "tokens left over, batch": (2, 1, 1, 77, (5, 10, 0, 4, 8)),
    "groups, weights of the rows": (2, 3, 2, 333, (2, 0, 24, 4, 0)),
    "one bit only": (1, 2, 1, 45, (0, 0, 0, 0, 24)),
    "three bits only": (1, 2, 1, 45, (0, 0, 24, 0, 0)),
    "no bits": (1, 1, 1, 40, (0, 0, 0, 0, 0)),
    "no tokens": (1, 1, 1, 0, (1, 2, 16, 4, 8)),
}
"""Batch, groups, batch of the weights, tokens, widths."""


@pytest.fixture(autouse=True)
def _seed():
    if compiled_functions() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


def _case(shape):
    batch, groups, weightings, tokens, widths = SHAPES[shape]
    store = BitCoefficients(widths, torch.rand(weightings, groups, sum(widths)) + 0.5)
    values = torch.randn(batch, groups, sum(widths), tokens) * 2.0 ** (8 * torch.rand(tokens) - 4)
    return store, values, (2.0 ** torch.tensor([7, 3, 2, 1, 0])).repeat_interleave(torch.tensor(widths))


def _by_torch(store, values, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encode_kernel, "applies", lambda values: False)
        return store.encode(values)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_torch_but_for_rounding(shape, monkeypatch):
    store, values, scale = _case(shape)
    values = values * scale[:, None]
    assert encode_kernel.applies(values)
    found, expected = store.encode(values), _by_torch(store, values, monkeypatch)
    assert list(found) == list(expected)
    assert all(found[name].shape == code.shape and code.dtype == torch.uint8 for name, code in expected.items())
    off = [
        ((store.decode(codes, torch.float64) - values.double()).square() * store.weights[..., None]).sum(2)
        for codes in (found, expected)
    ]
    torch.testing.assert_close(*off, rtol=1e-4, atol=1e-6)
    # every level is the closest one of its gain
    factors, middles = gain_factors(found["gains"], torch.float64)[:, :, None], store.centres(off[0])[:, None]
    scaled = (values / factors + middles).clamp_min(0).minimum(2 * middles)
    assert values.numel() == 0 or float((scaled - unpacked(found, store.widths)).abs().max()) <= 0.5 + 2.0**-13
    same = (found["gains"] == expected["gains"]).double()
    assert values.numel() == 0 or float(same.mean()) >= 0.97


def test_the_number_of_threads_does_not_matter():
    store, values, _ = _case("groups, weights of the rows")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(store.encode(values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], code) for name, code in found[1].items())


def test_coefficients_may_lie_in_any_order():
    store, values, _ = _case("groups, weights of the rows")
    expected = store.encode(values)
    found = store.encode(values.mT.contiguous().mT)
    assert all(torch.equal(found[name], code) for name, code in expected.items())


def test_where_it_does_not_serve():
    _, values, _ = _case("whole vectors")
    assert encode_kernel.applies(values)
    assert not encode_kernel.applies(values.double())
    assert not encode_kernel.applies(values.to("meta"))
    assert not encode_kernel.applies(values.clone().requires_grad_())
    with torch.no_grad():
        assert encode_kernel.applies(values.clone().requires_grad_())
