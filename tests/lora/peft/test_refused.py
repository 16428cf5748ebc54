"""Models that PEFT's files cannot hold, files that fit no model, and writes that fail: all change nothing."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_layers as lr

from ..peer import known_warnings
from .models import mlp, scramble

pytestmark = known_warnings

REFUSED = {
    "recurrent": (lambda: nn.Sequential(nn.LSTM(4, 6)), ["0"], r"'0\.weight_ih_l0'.*'0\.weight_hh_l0'"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), ["0"], "ConvTranspose2d"),
    "factored": (lambda: nn.Sequential(lr.TuckerConv2d(4, 6, 3, rank=2)), ["0"], "TuckerConv2d"),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 6)), ["0"], "EmbeddingBag"),
    "kdim": (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=4)}), ["a"], "kdim"),
    "the model itself": (lambda: nn.Linear(4, 6), ".*", "the model itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_adapters_for_is_refused_by_name(case, tmp_path):
    build, target, words = REFUSED[case]
    model = lr.add_lora_(build(), target, rank=1)
    with pytest.raises(lr.UnsupportedLayerError, match=words):
        lr.save_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edited(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def rewritten(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def torn(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])


A = "base_model.model.0.lora_A.weight"
BAD = {
    "missing key": (rewritten(lambda t: t.pop(A)), r"missing 'base_model\.model\.0\.lora_A\.weight'"),
    "extra key": (rewritten(lambda t: t.update(extra=torch.ones(2))), "unknown 'extra'"),
    "mistyped key": (
        rewritten(lambda t: t.update({A.replace("lora_A", "lora_a"): t.pop(A)})),
        r"missing .*lora_A.*unknown .*lora_a",
    ),
    "wrong shape": (rewritten(lambda t: t.update({A: torch.ones(2, 9)})), r"shape \(2, 9\), expected \(2, 8\)"),
    "wrong dtype": (rewritten(lambda t: t.update({A: torch.ones(2, 8, dtype=torch.int32)})), "int32"),
    "not finite": (rewritten(lambda t: t[A].fill_(torch.nan)), "NaN"),
    "wrong rank": (edited(r=3), r"expected \(3, 8\)"),
    "torn tensors": (torn("adapter_model.safetensors"), "torn"),
    "torn settings": (torn("adapter_config.json"), "no JSON"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "no such file"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither"),
    "peft_type": (edited(peft_type="IA3"), "IA3"),
    "no peft_type": (edited(peft_type=None), "peft_type is None"),
    "an unknown layer": (edited(target_modules=["0", "q_proj"]), "'q_proj', which the model has not"),
    "no layer": (edited(target_modules="x.*"), "matches nothing"),
    "a layer PEFT cannot adapt": (edited(target_modules=["0", "1"]), "'1' is a BatchNorm1d"),
    "one weight by two settings": (
        edited(target_parameters=["0.weight"]),
        "by target_modules and by target_parameters",
    ),
    "a bad expression": (edited(target_modules="("), r"target_modules is '\('"),
    "a bad rank": (edited(r="2"), "r is '2', expected an integer"),
    "a bad pattern": (edited(rank_pattern={"0": 0}), "rank_pattern"),
    "a bad dropout": (edited(lora_dropout=1.5), "lora_dropout"),
    "pissa without conversion": (edited(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    "corda": (edited(init_lora_weights="corda"), "corda"),
    "alora": (edited(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "megatron": (edited(megatron_config={"a": 1}, use_qalora=True), "megatron_config.*use_qalora"),
    "a newer field": (edited(use_magic=True), "use_magic"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_change_nothing(case, tmp_path):
    spoil, words = BAD[case]
    model = mlp()
    lr.save_lora(lr.add_lora_(copy.deepcopy(model), ["0"], rank=2), tmp_path, modules_to_save=["4"])
    lr.load_lora(copy.deepcopy(model), tmp_path)
    spoil(tmp_path)
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(lr.CheckpointError, match=words):
        lr.load_lora(model, tmp_path)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = lr.add_lora_(mlp(), rank=2)
    lr.save_lora(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scramble(model)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lowrank_layers.lora.peft.save.save_file", full)
    with pytest.raises(lr.CheckpointError, match="no space left"):
        lr.save_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
