"""Attentions that are shared, tied, hooked, computed or skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lowrank_layers as lr

from ..contracts.tables import relative
from .transformer_rows import (
    BATCH,
    HEADS,
    LENGTH,
    SIZE,
    TIGHT,
    Row,
    nested_tensor_warnings,
)

pytestmark = nested_tensor_warnings


class Twice(nn.Module):
    """One attention under two names, and a layer of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"attention": first})
        self.second = nn.ModuleDict({"attention": second})
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + block["attention"](x, x, x, need_weights=False)[0]
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_an_attention_under_two_names_is_opened_once(calibrated, tmp_path):
    attention = nn.MultiheadAttention(SIZE, HEADS)
    model = Twice(attention, attention)
    x = torch.randn(LENGTH, BATCH, SIZE)
    stats = lr.calibrate(model, [x]) if calibrated else None
    assert model.first["attention"] is model.second["attention"] is attention
    plan = lr.make_plan(model, rank=2, stats=stats)
    assert {e.name for e in plan} == {
        "fc",
        *(f"first.attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
    }
    assert plan.total.params == sum(p.numel() for p in model.parameters())
    lr.factorize_(model, plan, stats=stats, data=[x] if calibrated else None)
    assert model.first["attention"] is model.second["attention"]
    assert model.first["attention"].rank == (2, 2, 2, 2)
    lr.save(model, tmp_path / "model.safetensors")
    other = nn.MultiheadAttention(SIZE, HEADS)
    loaded = lr.load(tmp_path / "model.safetensors", into=Twice(other, other))
    assert torch.equal(loaded(x), model(x))
    assert loaded.first["attention"] is loaded.second["attention"]
    expected = model(x)
    lr.densify_(model)
    assert model.first["attention"] is model.second["attention"]
    assert type(model.first["attention"]) is nn.MultiheadAttention
    assert relative(model(x), expected) < TIGHT


def hooked(attention: nn.MultiheadAttention) -> None:
    attention.register_forward_hook(lambda *_: None)


def hooked_inside(attention: nn.MultiheadAttention) -> None:
    attention.out_proj.register_forward_pre_hook(lambda *_: None)


DERIVED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hooked": (hooked, "hooks"),
    "hooked inside": (hooked_inside, "hooks|reads out_proj.weight itself"),
    "orthogonal": (lambda a: parametrizations.orthogonal(a, "in_proj_weight"), "parametri"),
    "weight-normed inside": (lambda a: parametrizations.weight_norm(a.out_proj), "parametri"),
    "spectral-normed": (lambda a: nn.utils.spectral_norm(a, "in_proj_weight"), "parametri|hooks"),
    "pruned": (lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.3), "parametri|hooks"),
}


@pytest.mark.parametrize(("derive", "why"), DERIVED.values(), ids=DERIVED)
def test_a_hooked_or_computed_attention_stays_dense_with_a_reason(derive, why):
    model = Twice(nn.MultiheadAttention(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS))
    derive(model.second["attention"])
    before = model.second["attention"]
    plan = lr.make_plan(model, rank=2)
    assert not [entry for entry in plan if entry.name.startswith("second")]
    assert "second.attention" in plan.skipped
    reasons = [reason for name, reason in plan.skipped.items() if name.startswith("second.attention")]
    assert any(any(word in reason for word in why.split("|")) for reason in reasons), plan.skipped
    x = torch.randn(LENGTH, BATCH, SIZE)
    stats = lr.calibrate(model, [x])
    lr.factorize_(model, lr.make_plan(model, rank=2, stats=stats), stats=stats)
    assert model.second["attention"] is before
    assert isinstance(model.first["attention"], lr.LowRankMultiheadAttention)


def tied_inside(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.in_proj_weight = first.in_proj_weight


def tied_outside(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.out_proj.weight = first.out_proj.weight


def tied_to_a_layer(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    model.fc.weight = first.out_proj.weight


def shared_child(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.out_proj = first.out_proj


@pytest.mark.parametrize("tie", [tied_inside, tied_outside, tied_to_a_layer, shared_child])
def test_tied_attentions_stay_tied_and_dense_with_a_reason(tie):
    first, second = nn.MultiheadAttention(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS)
    model = Twice(first, second)
    tie(first, second, model)
    size = sum(p.numel() for p in model.parameters())
    plan = lr.make_plan(model, rank=2)
    assert plan.total.params == size  # shared ones once
    assert "tied" in " ".join(plan.skipped.values()), plan.skipped
    lr.factorize_(model, plan)
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    if tie is not tied_to_a_layer:
        assert model.first["attention"] is first
        assert model.second["attention"] is second
    else:
        assert model.fc.weight is model.first["attention"].out_proj.weight


SKIPS: dict[str, list[Any]] = {
    "full name": ["layers.0.self_attn", "layers.1.self_attn"],
    "end of the name": ["self_attn"],
    "type": [nn.MultiheadAttention],
    "predicate": [lambda name, module: isinstance(module, nn.MultiheadAttention)],
    "projections": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_an_attention_is_skipped_by_name_end_type_or_predicate(skip):
    model = Row("Encoder", {}).build()
    plan = lr.make_plan(model, rank=2, skip=skip)
    assert {entry.name for entry in plan} == {f"layers.{k}.linear{j}" for k in (0, 1) for j in (1, 2)}
    lr.factorize_(model, plan)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


def test_an_attention_that_is_the_model_itself_is_refused_with_a_remedy():
    with pytest.raises(lr.LowRankError, match=r"wrap it in nn\.Sequential"):
        lr.make_plan(nn.MultiheadAttention(SIZE, HEADS), rank=2)


def test_keys_and_values_of_their_own_width_are_planned():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(SIZE, HEADS, kdim=8, vdim=10, add_bias_kv=True, bias=False)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attention(q, k, v)[0]
            return out

    model = Cross()
    x = torch.randn(4, 3, SIZE), torch.randn(5, 3, 8), torch.randn(5, 3, 10)
    stats = lr.calibrate(model, [x])
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats=stats)
    lr.factorize_(model, plan, stats=stats, data=[x])
    assert sum(p.numel() for p in model.parameters()) == plan.after.params <= 0.6 * plan.total.params
    expected = model(*x)
    lr.densify_(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert relative(model(*x), expected) < TIGHT
