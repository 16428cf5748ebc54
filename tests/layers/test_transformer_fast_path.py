"""Torch's fast path for encoders is left while a layer is factored, and taken again once it is dense."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .transformer_rows import (
    HEADS,
    HIDDEN,
    SIZE,
    Spy,
    densified,
    factorized,
    fast_rows,
    nested_tensor_warnings,
    parts,
)

pytestmark = nested_tensor_warnings


@fast_rows
@parts
def test_the_factored_children_are_called_and_their_weight_is_not_multiplied_out(row, part, monkeypatch):
    """Not by a forward hook, which would itself keep torch off its fast path."""
    model = factorized(row.build(), part).eval()
    x = row.inputs()
    calls: Counter[nn.Module] = Counter()
    original = lr.LowRankLinear.forward

    def counting(self: lr.LowRankLinear, input: Tensor) -> Tensor:
        calls[self] += 1
        return original(self, input)

    def product_of_the_factors(self: lr.LowRankLinear) -> Tensor:
        raise AssertionError("the weight was multiplied out")

    monkeypatch.setattr(lr.LowRankLinear, "forward", counting)
    monkeypatch.setattr(lr.LowRankLinear, "weight", property(product_of_the_factors))
    with torch.no_grad():
        model(**x)
    assert dict(calls) == {module: 1 for module in model.modules() if isinstance(module, lr.LowRankLinear)}


@fast_rows
def test_densify_gives_the_fast_path_back(row, monkeypatch):
    model = row.build().eval()
    before = [dict(vars(module)) for module in model.modules() if "Encoder" in type(module).__name__]
    spy = Spy(monkeypatch)
    x = row.inputs()
    with torch.no_grad():
        expected = model(**x)
        per_call = spy.calls
        assert per_call == len([m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)])
        factorized(model)
        model(**x)
        assert spy.calls == per_call
        lr.densify_(model)
        got = model(**x)
    assert spy.calls == 2 * per_call
    assert got.shape == expected.shape
    after = [vars(module) for module in model.modules() if "Encoder" in type(module).__name__]
    for old, new in zip(before, after, strict=True):
        assert new.keys() == old.keys()
        for flag in ("activation_relu_or_gelu", "use_nested_tensor", "enable_nested_tensor"):
            assert new.get(flag) == old.get(flag), flag


@fast_rows
def test_a_copy_of_the_factored_model_gets_its_fast_path_back_too(row, monkeypatch):
    model = factorized(row.build()).eval()
    spy = Spy(monkeypatch)
    with torch.no_grad():
        densified(model)(**row.inputs())
        assert spy.calls > 0
        spy.calls = 0
        model(**row.inputs())
        assert spy.calls == 0


def test_an_activation_of_ones_own_stays_off_the_fast_path():
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, HIDDEN, activation=torch.tanh, batch_first=True)
    assert layer.activation_relu_or_gelu == 0
    lr.densify_(factorized(layer))
    assert layer.activation_relu_or_gelu == 0


@fast_rows
def test_planning_and_calibrating_leave_the_fast_path_on(row, monkeypatch):
    model = row.build().eval()
    with torch.no_grad():
        expected = model(**row.inputs())
    spy = Spy(monkeypatch)
    stats = lr.calibrate(model, [row.inputs()])
    assert spy.calls == 0  # calibration sees every layer
    lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
    with torch.no_grad():
        assert torch.equal(model(**row.inputs()), expected)
    assert spy.calls > 0
