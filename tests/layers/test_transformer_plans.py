"""Torch's transformer layers are planned, saved, loaded and densified projection by projection."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .transformer_rows import (
    BUILDERS,
    HIDDEN,
    PARTS,
    Row,
    assert_untouched,
    densified,
    factorized,
    kinds,
    nested_tensor_warnings,
)

pytestmark = nested_tensor_warnings


@kinds
def test_every_projection_is_planned_by_its_name(row):
    model = row.build()
    plan = lr.make_plan(model, rank=2)
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    expected = {f"{name}.{part}" for name in attentions for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    expected |= {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {entry.name for entry in plan} == expected
    assert plan.skipped == {}
    assert plan.total.params == sum(p.numel() for p in model.parameters())
    lr.factorize_(model, plan)
    assert plan.after.params == sum(p.numel() for p in model.parameters())


@kinds
@pytest.mark.parametrize("part", ["everything", "attention", "linear1", "out_proj"])
def test_the_plan_is_read_back_off_the_model_and_from_its_file(row, part, tmp_path):
    model = row.build()
    chosen = PARTS[part]
    plan = lr.make_plan(model, rank=2, skip=[] if part == "everything" else [lambda name, _: not chosen(name)])
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    first, second = row.build(), row.build()
    lr.factorize_(first, plan)
    lr.factorize_(second, loaded)
    read = lr.Plan.from_model(first)
    assert {(e.name, e.method, e.rank) for e in read} == {(e.name, e.method, e.rank) for e in plan}
    assert read.total.params == plan.total.params
    assert read.after.params == plan.after.params
    third = lr.factorize_(row.build(), read)
    x = row.inputs()
    assert torch.equal(first(**x), second(**x))
    assert torch.equal(first(**x), third(**x))


@kinds
@pytest.mark.parametrize("part", ["everything", "attention", "linear1", "out_proj"])
def test_save_and_load(row, part, tmp_path):
    model = factorized(row.build(), part).eval()
    lr.save(model, tmp_path / "model.safetensors")
    x = row.inputs()
    with torch.device("meta"):
        empty = BUILDERS[row.kind]({"dropout": 0.0, "dim_feedforward": HIDDEN, **row.settings})
    for into in (row.build(), empty, copy.deepcopy(model)):
        loaded = lr.load(tmp_path / "model.safetensors", into=into).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**x), model(**x))
        assert repr(loaded) == repr(model)
        back = densified(loaded)
        assert repr(back) == repr(row.build())


@kinds
def test_a_file_for_another_model_changes_nothing(row, tmp_path):
    lr.save(factorized(row.build()), tmp_path / "model.safetensors")
    other = BUILDERS[row.kind]({"dim_feedforward": HIDDEN + 4, **row.settings})
    before, modules = copy.deepcopy(other.state_dict()), dict(other.named_modules())
    with pytest.raises(lr.CheckpointError):
        lr.load(tmp_path / "model.safetensors", into=other)
    assert_untouched(other, before, modules)


@kinds
def test_densify_restores_the_structure_and_the_names(row):
    model = row.build()
    names, types = list(model.state_dict()), [type(module) for module in model.modules()]
    lr.densify_(factorized(model))
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == types


@kinds
def test_the_optimizer_follows(row):
    model = row.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = row.inputs()

    def step() -> None:
        optimizer.zero_grad()
        model(**x).square().mean().backward()
        optimizer.step()

    def check() -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == set(model.parameters())
        assert set(optimizer.state) <= set(held)
        before = copy.deepcopy(model.state_dict())
        step()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved >= {name for name in before if "weight" in name}

    step()
    factorized(model, optimizer=optimizer)
    check()
    lr.densify_(model, optimizer=optimizer)
    check()


def test_the_groups_of_the_optimizer_stay_apart():
    model = Row("Encoder", {}).build()
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    others = [p for name, p in model.named_parameters() if "self_attn" not in name]
    optimizer = torch.optim.SGD([{"params": attention, "lr": 0.1}, {"params": others, "lr": 0.2}], lr=1.0)
    factorized(model, optimizer=optimizer)
    for rate, inside in ((0.1, True), (0.2, False)):
        group = next(group for group in optimizer.param_groups if group["lr"] == rate)
        expected = {p for name, p in model.named_parameters() if ("self_attn" in name) == inside}
        assert set(group["params"]) == expected
        assert len(group["params"]) == len(expected)
