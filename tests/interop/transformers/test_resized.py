"""Models that have lost hidden units, another number in each block: everything that is done with a model works."""

from __future__ import annotations

import copy

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.command_line.main import main
from lowrank_layers.layers import is_resized

from .models import KINDS, narrow, narrow_pairs, output, tokens

KIND = KINDS["llama"]
BATCHES = [tokens()]


@pytest.fixture(params=[narrow, narrow_pairs], ids=["units", "units and pairs"])
def model(request):
    return request.param(KIND)


def count(model) -> int:
    """The number of layers of other sizes."""
    return sum(map(is_resized, model.modules()))


def test_folders_twice(model, tmp_path):
    model.save_pretrained(tmp_path / "once")
    KIND.load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    loaded = KIND.load(tmp_path / "twice")
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    assert count(loaded) == count(model) == 6


@pytest.mark.parametrize("into", ["the dense model", "one of the same sizes"])
def test_files(model, tmp_path, into):
    lr.save(model, tmp_path / "small.safetensors")
    target = KIND.dense() if into == "the dense model" else copy.deepcopy(model)
    loaded = lr.load(tmp_path / "small.safetensors", into=target)
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    assert count(loaded) == 6


def test_dense_layers_of_their_sizes_come_back(model, tmp_path):
    expected = output(model, tokens())
    assert count(lr.densify_(model)) == 6
    assert not any(isinstance(module, lr.FactoredModule) for module in model.modules())
    torch.testing.assert_close(output(model, tokens()), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(KIND.load(tmp_path), tokens()), output(model, tokens()))


def test_export(model):
    program = torch.export.export(model, (), {**tokens(), "use_cache": False})
    exported = program.module()(**tokens(), use_cache=False).logits
    torch.testing.assert_close(exported, output(model, tokens()), rtol=1e-4, atol=1e-5)


def test_more_units_go(model, tmp_path):
    stats = lr.calibrate(model, BATCHES)
    lr.factorize_(
        model, lr.make_plan(model, lr.Budget(params=0.9), stats, [lr.SVDMethod(), lr.HiddenUnitsMethod()]), stats
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(output(KIND.load(tmp_path), tokens()), output(model, tokens()))


def adapted(model):
    lr.add_lora_(model, ["q_proj", "gate_proj"], rank=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.normal_()
    return model


def test_adapters_are_saved_loaded_and_merged(tmp_path):
    base = narrow(KIND)
    model = adapted(copy.deepcopy(base))
    expected = output(model, tokens())
    assert not torch.equal(expected, output(base, tokens()))
    lr.save_lora(model, tmp_path / "adapter")
    assert torch.equal(output(lr.load_lora(base, tmp_path / "adapter"), tokens()), expected)
    lr.merge_lora_(model, unload=True)
    torch.testing.assert_close(output(model, tokens()), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(KIND.load(tmp_path / "merged"), tokens()), output(model, tokens()))


def test_files_hold_the_sizes_of_layers_with_adapters(tmp_path):
    """As Trainer writes its checkpoints; the folder is that of the base model, with the adapters beside it."""
    base = narrow(KIND)
    model = adapted(copy.deepcopy(base))
    lr.save(model, tmp_path / "small.safetensors")
    loaded = lr.load(tmp_path / "small.safetensors", into=adapted(copy.deepcopy(base)))
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(KIND.load(tmp_path), tokens()), output(base, tokens()))


def test_what_takes_dense_models_says_so(model, tmp_path, capsys):
    folder, small = tmp_path / "small", tmp_path / "smaller"
    model.save_pretrained(folder, remote_code=True)
    for _ in range(2):
        with pytest.raises(lr.CheckpointError, match="is compressed already, expected a dense one; compress the dense"):
            lr.compress_checkpoint(folder, small, lr.Budget(params=0.5), BATCHES)
        assert main(["apply", str(folder), str(small), "--budget", "0.5"]) == 2
        assert "compressed already" in capsys.readouterr().err
        model.save_pretrained(folder)
    KIND.dense().save_pretrained(tmp_path / "dense")
    dense = KIND.dense()
    stats = lr.calibrate(dense, BATCHES)
    lr.make_plan(dense, lr.Budget(params=0.9), stats, [lr.HiddenUnitsMethod()]).save(tmp_path / "plan.json")
    assert main(["apply", str(tmp_path / "dense"), str(small), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "factorize_ with statistics" in capsys.readouterr().err
    assert not small.exists()
