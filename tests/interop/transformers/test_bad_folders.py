"""Folders that cannot be read: one clear error each, and no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

import lowrank_layers as lr

from .models import KINDS, narrow

VERSION = transformers.__version__


@pytest.fixture
def folder(tmp_path) -> Path:
    """A factored model in several shards."""
    KINDS["llama"].factored().save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the quantization_config in the config.json of a folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(lr.CheckpointError, match=match):
        KINDS["llama"].load(folder)


def test_a_version_of_the_format_that_is_newer_than_the_code(folder):
    edit(folder, lambda config: config.update(version=2))
    refused(folder, r"version 2 of the format 'lowrank', expected 1; update lowrank-layers")


def test_a_class_of_layers_that_is_newer_than_the_code(folder):
    edit(folder, lambda config: config["layers"]["lm_head"].update(type="LowRankQuaternion"))
    refused(folder, "'lm_head': its class 'LowRankQuaternion' is unknown; .* or update the package")


def test_a_setting_that_is_newer_than_the_code(folder):
    edit(folder, lambda config: config["layers"]["lm_head"].update(bits=3))
    refused(folder, "'lm_head': its description .* is damaged or newer")
    edit(folder, lambda config: config["layers"]["lm_head"].pop("bits"))
    edit(folder, lambda config: config["layers"]["lm_head"].update(form={"bits": 3}))
    refused(folder, "'lm_head': .*bits")


def test_an_entry_that_is_newer_than_the_code(folder):
    edit(folder, lambda config: config.update(codebook="x"))
    refused(folder, "the unknown entry 'codebook'; update lowrank-layers")


def test_a_damaged_description(folder):
    edit(folder, lambda config: config.update(layers=["lm_head"]))
    refused(folder, "damaged")
    edit(folder, lambda config: config.update(layers={"lm_head": 3}))
    refused(folder, "'lm_head': its description 3 is damaged")


def test_the_plan_of_another_model(folder):
    plan = {"model.layers.9.mlp.up_proj": {"type": "LowRankLinear", "rank": 3, "bias": False}}
    edit(folder, lambda config: config["layers"].update(plan))
    refused(folder, r"'model.layers.9.mlp.up_proj': the model has no such layer; it is for another model")


def test_the_versions_are_named_where_another_one_saved_the_folder(folder):
    edit(folder, lambda config: config["layers"].update(other=config["layers"]["lm_head"]))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_version": "6.1.0"}))
    refused(folder, f"'other': the model has no such layer.*saved by transformers 6.1.0, and read by {VERSION}")


def test_a_layer_of_another_kind(folder):
    edit(folder, lambda config: config["layers"]["lm_head"].update(type="LowRankEmbedding"))
    refused(folder, "'lm_head': replaces nn.Embedding, but the model has a Linear; it is for another model")


def test_other_ranks_than_in_the_files(folder):
    edit(folder, lambda config: config["layers"]["lm_head"].update(rank=3))
    refused(folder, r"'lm_head.down.weight' has shape \(\d+, \d+\), expected \(3, \d+\).*from different models")


def test_a_layer_that_the_plan_leaves_dense(folder):
    edit(folder, lambda config: config["layers"].pop("lm_head"))
    refused(folder, "'lm_head.down.weight' is a factor of a layer that config.json leaves dense")


def test_other_sizes_in_the_configuration(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 128}))
    refused(folder, r"has shape \(\d+, \d+\), expected \(\d+, \d+\)")


def test_missing_shards(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(folder, f"1 of {len(shards)} files of weights are missing: {shards[1].name}; copy them")


def test_a_torn_shard(folder):
    shard = max(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(folder, f"{shard.name}: is torn")


def test_tensors_that_are_in_no_file(folder):
    for shard in folder.glob("model-*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.up.weight", None) is not None:
            save_file(tensors, shard, {"format": "pt"})
    refused(folder, "lack 1 tensors of low-rank or resized layers: lm_head.up.weight; they are damaged or incomplete")


def test_nothing_of_the_model(folder):
    def rename(config):
        config["layers"] = {f"other.{name}": layer for name, layer in config["layers"].items()}

    edit(folder, rename)
    refused(folder, "no such layer; it is for another model")


def test_layers_of_other_sizes_than_in_the_files(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    narrow(KINDS["llama"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: t for key, t in tensors.items() if key != f"{name}.weight"}, tmp_path / "model.safetensors")
    refused(tmp_path, rf"lack 1 tensors of low-rank or resized layers: {name}\.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path, lambda config: config["resized"][name].update(out_features=40))
    refused(tmp_path, rf"{name}\.weight' has shape \(41, 64\), expected \(40, 64\)")
    for damaged in (3, {"type": "Linear"}, {"type": "Quaternion", "dtype": "float32"}):
        edit(tmp_path, lambda config, damaged=damaged: config["resized"].update({name: damaged}))
        refused(tmp_path, rf"config\.json: '{name}': .*description")
