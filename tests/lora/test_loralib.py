"""Files of loralib and torchtune, which have no settings."""

import copy

import pytest
import torch

import lowrank_layers as lr
from benchmarks.data import ROOT
from lowrank_layers.lora.adapter import Adapter

from .peer import known_warnings
from .peft.models import mlp, run, transformers

REAL = ROOT / "lora_real" / "roberta_base_lora_mnli.bin"
pytestmark = known_warnings


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a.weight", "lora_b.weight")])
def test_files_without_settings(names, tmp_path):
    model, x = mlp(), torch.randn(3, 8)
    a, b, bias = torch.randn(2, 8), torch.randn(12, 2), torch.randn(6)
    file = tmp_path / "adapter_0.pt"
    torch.save({f"0.{names[0]}": a, f"0.{names[1]}": b, "4.bias": bias}, file)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[0].weight += 3 / 2 * b @ a
        dense[4].bias.copy_(bias)
    for settings, words in (({}, "alpha None"), ({"alpha": 3, "rank": 4}, "expected \\(4, 8\\)")):
        with pytest.raises(lr.CheckpointError, match=words):
            lr.load_lora(model, file, **settings)
    assert torch.allclose(run(lr.load_lora(model, file, alpha=3), x), run(dense, x), atol=1e-5)
    torch.save({f"0.{names[0]}": torch.randn(4, 8), f"0.{names[1]}": b, f"9.{names[0]}": a}, file)
    with pytest.raises(lr.CheckpointError, match=r"MergedLinear.*'9', which the model has not"):
        lr.load_lora(mlp(), file, alpha=3)


@pytest.mark.skipif(not REAL.exists(), reason="the released adapter is not there")
def test_the_released_adapter_of_loralib():
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=40, num_labels=3)
    model, x = transformers.RobertaForSequenceClassification(config), torch.randint(5, 50, (2, 7))
    dense, tensors = copy.deepcopy(model), torch.load(REAL, map_location="cpu", weights_only=True)
    lr.load_lora(model, REAL, rank=8, alpha=16)
    with torch.no_grad():
        for key, value in tensors.items():
            if key.endswith("lora_A"):
                dense.get_submodule(key[:-7]).weight += 2 * tensors[key[:-1] + "B"] @ value
            elif "lora_" not in key:
                dense.get_parameter(key).copy_(value)
    assert torch.allclose(run(model, x), run(dense, x), atol=1e-5)
    assert sum(isinstance(module, Adapter) for module in model.modules()) == 24
