"""Which parts of a model are its stages."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.calibrate.stages import find_stages

from .staged_models import Residual, UNet

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_items_of_nested_sequentials_are_stages_and_so_are_the_layers_beside_them():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Sequential(Residual(8), Residual(8)),
        nn.Sequential(Residual(8)),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    assert find_stages(model) == ["0", "2.0", "2.1", "3.0", "5"]


def test_a_bare_layer_is_its_own_stage():
    assert find_stages(nn.Linear(4, 4)) == [""]
    assert find_stages(nn.Sequential(nn.Linear(4, 4))) == ["0"]


def test_encoder_and_decoder_of_torch():
    model = nn.Transformer(8, 2, 2, 1, 16, batch_first=True)
    assert find_stages(model) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"]


def test_levels_of_a_u_net():
    assert find_stages(UNet()) == ["stem", "down.0", "down.1", "up.0", "up.1", "head"]


@pytest.mark.parametrize(
    ("kind", "head", "settings", "stages"),
    [
        (
            "Llama",
            "ForCausalLM",
            {"vocab_size": 60},
            ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"],
        ),
        (
            "Bert",
            "ForSequenceClassification",
            {"vocab_size": 60},
            [
                *("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"),
                *("bert.pooler.dense", "classifier"),
            ],
        ),
        (
            "T5",
            "ForConditionalGeneration",
            {"vocab_size": 60, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2},
            [
                *("shared", "encoder.embed_tokens", "encoder.block.0", "encoder.block.1"),
                *("decoder.embed_tokens", "decoder.block.0", "decoder.block.1", "lm_head"),
            ],
        ),
        (
            "ViT",
            "ForImageClassification",
            {"image_size": 16, "patch_size": 8},
            ["vit.embeddings", "vit.layers.0", "vit.layers.1", "classifier"],
        ),
    ],
)
def test_blocks_of_transformers_are_stages(kind, head, settings, stages):
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**SIZES | settings))
    assert find_stages(model) == stages


def test_stages_of_the_user_stand_in_the_place_of_those_that_are_found():
    model = UNet()
    assert find_stages(model, ["down", "up.1"]) == [
        "stem",
        "down.0",
        "down.1",
        "up.0.first",
        "up.0.second",
        "up.1",
        "head",
    ]
    with pytest.raises(lr.LowRankError, match="matches no module"):
        find_stages(model, ["sideways"])


def test_a_model_without_layers_is_refused():
    with pytest.raises(lr.LowRankError, match="without linear layers"):
        find_stages(nn.Sequential(nn.ReLU()))
