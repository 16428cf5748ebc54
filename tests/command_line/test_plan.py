"""``lowrank plan`` and ``lowrank apply`` do what make_plan, factorize_ and save do with the model itself."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.command_line import main

from .files import Small, run_json, write, write_sharded

SVD = [lr.SVDMethod()]


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0)


def ranks(plan):
    return {entry.name: (entry.method, entry.rank) for entry in plan}


def test_a_budget_gives_the_plan_of_the_model(tmp_path, capsys):
    model = Small()
    path = write(model, tmp_path / "model.safetensors")
    run_json(capsys, "plan", path, tmp_path / "plan.json", "--budget", "0.7")
    plan = lr.Plan.load(tmp_path / "plan.json")
    expected = lr.make_plan(model, lr.Budget(params=0.7), methods=SVD, skip=["embed_tokens"])
    assert ranks(plan) == ranks(expected)
    assert (plan.total, plan.after) == (expected.total, expected.after)
    assert any(entry.rank for entry in plan)


@pytest.mark.parametrize(("option", "rule"), [("--rank=4", 4), ("--energy=0.8", lr.Energy(0.8))])
def test_a_rule_gives_the_plan_of_the_model(tmp_path, capsys, option, rule):
    model = Small()
    run_json(capsys, "plan", write(model, tmp_path / "m.safetensors"), tmp_path / "plan.json", option, "--exclude=head")
    plan = lr.Plan.load(tmp_path / "plan.json")
    expected = lr.make_plan(model, rank=rule, methods=SVD, skip=["embed_tokens", "lm_head"])
    assert ranks(plan) == ranks(expected)
    assert plan.skipped["lm_head"] == "as asked"
    assert "embedding" in plan.skipped["embed_tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_file_is_that_of_save(tmp_path, capsys, dtype):
    model = Small().to(dtype)
    folder = write_sharded(model.state_dict(), tmp_path / "model")
    run_json(capsys, "plan", folder, tmp_path / "plan.json", "--budget", "0.6")
    out = tmp_path / "small.safetensors"
    printed = run_json(capsys, "apply", folder, out, "--plan", tmp_path / "plan.json")
    loaded = lr.load(out, into=Small().to(dtype))
    factorized = lr.factorize_(copy.deepcopy(model), lr.Plan.load(tmp_path / "plan.json"))
    assert_same_state(loaded, factorized)
    assert sum(p.numel() for p in loaded.parameters()) <= 0.6 * printed["total"]["params"]


def test_a_tied_head_is_named(tmp_path):
    class Tied(Small):
        def __init__(self):
            super().__init__()
            self.lm_head.weight = self.embed_tokens.weight

    model = Tied()
    state = model.state_dict()
    del state["lm_head.weight"]
    folder, out = write_sharded(state, tmp_path / "model"), tmp_path / "small.safetensors"
    assert main(["apply", str(folder), str(out), "--rank=4", "--tied", "lm_head.weight=embed_tokens.weight"]) == 0
    loaded = lr.load(out, into=Tied())
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


def test_weights_of_conv1d_are_known_by_their_biases(tmp_path, capsys):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def build():
        return nn.ModuleDict({"c_attn": conv1d(24, 8), "c_proj": conv1d(8, 8), "lm_head": nn.Linear(8, 8, bias=False)})

    model = build()
    path, out = write(model, tmp_path / "model.safetensors"), tmp_path / "small.safetensors"
    plan = run_json(capsys, "apply", path, out, "--rank=2")
    kinds = {entry["name"]: entry["layer"]["type"] for entry in plan["entries"]}
    assert kinds == {"c_attn": "Conv1D", "c_proj": "Conv1D", "lm_head": "Linear"}
    assert_same_state(lr.load(out, into=build()), lr.factorize_(model, lr.make_plan(model, rank=2, methods=SVD)))


def test_what_is_no_linear_layer_is_left_alone_with_a_reason(tmp_path, capsys):
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "conv": nn.Conv2d(3, 4, 3),
            "attention": nn.MultiheadAttention(8, 2),
            "wte": nn.Embedding(9, 8),
            "norm": nn.BatchNorm1d(6),
        }
    )
    state = model.state_dict() | {"int8.weight": torch.ones(4, 4, dtype=torch.int8)}
    plan = run_json(capsys, "plan", write_sharded(state, tmp_path / "m"), tmp_path / "plan.json", "--rank=1")
    assert [entry["name"] for entry in plan["entries"]] == ["linear"]
    assert plan["skipped"].keys() == {"conv", "attention.out_proj", "wte", "int8"}
    assert plan["total"]["params"] == sum(tensor.numel() for tensor in state.values())
