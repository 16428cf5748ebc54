"""Models of transformers keep no keys and values while they are compressed: passes that wait would hold all of them."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

BATCHES = [{"input_ids": torch.arange(24).view(1, 24) * (k + 3) % 50} for k in range(4)]


@pytest.fixture(scope="module")
def model():
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()


@pytest.fixture(scope="module")
def stats(model):
    return lr.calibrate(model, BATCHES, loss=lr.SampledCrossEntropy())


def ways(model, stats):
    """What runs the model again and again, by name."""
    plan = lr.make_plan(model, rank=8, stats=stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    return {
        "in sequence": lambda: lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=BATCHES),
        "measured": lambda: lr.make_plan(model, lr.Budget(params=0.6), stats, batches=BATCHES),
        "refined": lambda: lr.refine_(small, model, BATCHES, epochs=1),
    }


@pytest.mark.parametrize("way", ["in sequence", "measured", "refined"])
def test_no_keys_and_values_are_kept(model, stats, way):
    from transformers import DynamicCache

    run = ways(model, stats)[way]
    with mock.patch.object(DynamicCache, "update", side_effect=AssertionError("keys and values are kept")):
        run()
    assert model.config.use_cache
