"""``lowrank extract-lora`` and ``merge-lora`` do what the library does with whole models, and PEFT reads the result."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_layers as lr
from lowrank_layers.command_line import main

from ..lora import peer
from .files import Small, low_rank, run_json, write, write_sharded


@pytest.fixture
def pair(tmp_path):
    """A base, and the same after tuning everything: linear layers at rank 3, norm, biases, a larger vocabulary."""
    base, tuned = Small(), Small(vocabulary=33)
    state = base.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name] + 0.01, torch.randn(3, 16)])
    tuned.load_state_dict(state)
    head = tuned.lm_head.weight.detach().clone()
    low_rank(tuned)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(head)
        tuned.layers.norm.weight += 0.1
        tuned.layers.up.bias += 0.1
    return (
        base,
        tuned,
        write(base, tmp_path / "base.safetensors"),
        write_sharded(tuned.state_dict(), tmp_path / "tuned"),
    )


def resized(base):
    """The base with the larger vocabulary, whose new rows are arbitrary."""
    model = Small(vocabulary=33)
    state = base.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(3, 16)])
    model.load_state_dict(state)
    return model


def test_the_adapter_makes_the_base_the_tuned_model_in_peft_and_here(pair, tmp_path, capsys):
    peft = peer.peft()
    base, tuned, base_file, tuned_folder = pair
    printed = run_json(capsys, "extract-lora", base_file, tuned_folder, tmp_path / "adapter", "--rank=3")
    assert printed["adapters"].keys() == {"layers.up", "layers.down", "layers.out"}
    assert set(printed["carried"]) == {"embed_tokens", "layers.norm", "lm_head"}
    tokens = torch.arange(33)
    for model in (
        peft.PeftModel.from_pretrained(resized(base), tmp_path / "adapter"),
        lr.load_lora(resized(base), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(model.eval()(tokens), tuned(tokens), rtol=1e-4, atol=1e-4)


def test_parameters_that_no_module_of_peft_holds_are_named(tmp_path, capsys):
    base = Small()
    tuned = low_rank(copy.deepcopy(base))
    old, new = base.state_dict(), tuned.state_dict()
    for name in ("scale", "layers.gate"):  # of the model itself, and of a module with others inside
        old[name], new[name] = torch.ones(3), torch.zeros(3)
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    files = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    printed = run_json(capsys, "extract-lora", *files, tmp_path / "adapter", "--rank=3")
    assert set(printed["left"]) == {"", "layers"}
    assert printed["carried"] == []
    assert len(printed["adapters"]) == 4


@pytest.mark.parametrize(("option", "keyword"), [("--rank=2", {"rank": 2}), ("--energy=0.8", {"energy": 0.8})])
def test_extraction_is_that_of_the_library(tmp_path, capsys, option, keyword):
    base = Small()
    tuned = low_rank(copy.deepcopy(base), rank=5)
    files = write(base, tmp_path / "base.safetensors"), write(tuned, tmp_path / "tuned.safetensors")
    printed = run_json(
        capsys, "extract-lora", *files, tmp_path / "adapter", option, "--exclude=out", "--include=layers"
    )
    expected = lr.extract_lora(base, tuned, target=["layers.up", "layers.down"], **keyword)
    assert printed["adapters"].keys() == {owner for owner, _ in expected}
    for (owner, _), each in expected.items():
        assert printed["adapters"][owner] == {"rank": each.rank, "change": each.change, "energy": each.energy}
    theirs, ours = expected.apply_(copy.deepcopy(base)), lr.load_lora(base, tmp_path / "adapter")
    torch.testing.assert_close(ours.layers.up.weight, theirs.layers.up.weight)
    torch.testing.assert_close(ours.layers.down.weight, theirs.layers.down.weight)


def test_a_budget_keeps_the_most_of_the_change(tmp_path, capsys):
    base = Small()
    tuned = low_rank(copy.deepcopy(base), rank=6)
    files = write(base, tmp_path / "base.safetensors"), write(tuned, tmp_path / "tuned.safetensors")
    printed = run_json(capsys, "extract-lora", *files, tmp_path / "adapter", "--budget=400")
    assert printed["params"] <= 400
    old, new = base.state_dict(), tuned.state_dict()
    changes = {
        name: torch.linalg.svdvals((new[f"{name}.weight"] - old[f"{name}.weight"]).double())
        for name in ("layers.up", "layers.down", "layers.out", "lm_head")
    }
    chosen = {name: printed["adapters"].get(name, {"rank": 0})["rank"] for name in changes}

    def kept(ranks):
        return sum(float(values[: ranks[name]].square().sum()) for name, values in changes.items())

    def size(ranks):
        return sum(rank * sum(base.get_submodule(name).weight.shape) for name, rank in ranks.items())

    for more in chosen:  # no exchange of one direction for another keeps more
        for less in chosen:
            other = {**chosen, more: chosen[more] + 1}
            other[less] = max(0, other[less] - (more != less))
            assert size(other) > 400 or kept(other) <= kept(chosen) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_is_that_of_the_library(tmp_path, capsys, dtype, dora):
    base = Small().to(dtype)
    path = write(base, tmp_path / "base.safetensors")
    adapted = lr.add_lora_(copy.deepcopy(base), rank=2, target=["up", "embed_tokens"], alpha=3, dora=dora)
    with torch.no_grad():
        for parameter in lr.lora_parameters(adapted):
            parameter += 0.1 * torch.randn_like(parameter)
    lr.save_lora(adapted, tmp_path / "adapter")
    assert run_json(capsys, "merge-lora", path, tmp_path / "adapter", tmp_path / "out.safetensors")["merged"] == 2
    merged = lr.merge_lora_(adapted, unload=True).state_dict()
    found = Small().to(dtype)
    found.load_state_dict(load_file(tmp_path / "out.safetensors"))
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0)


def test_what_was_extracted_is_merged_again_into_a_folder(pair, tmp_path):
    base, tuned, _, tuned_folder = pair
    folder = write_sharded(base.state_dict(), tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({"model_type": "small"}))
    assert main(["extract-lora", str(folder), str(tuned_folder), str(tmp_path / "adapter"), "--rank=3"]) == 0
    assert main(["merge-lora", str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {"config.json", "model.safetensors"}
    found = Small(vocabulary=33)
    found.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, tuned.state_dict()[name], rtol=1e-4, atol=1e-5)
