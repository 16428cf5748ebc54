"""A compressed model, with its parameters in files, as the folder that :func:`load` and transformers read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from ..compress import Plan
from ..compress.build import write_
from ..files import TensorInfo, replacing, write_sharded
from ..layers import bias_of, is_factored, weight_of
from ..memory import release_mapped
from ..modules import ModelDescription, opened_attentions, replace_, shared_names, to_quantization_config
from .model_file import KEY, VERSION

SHARD = 5 << 30
"""Bytes of one file of weights, at most, where a single tensor is not larger."""


def put_in_place_(model: nn.Module, built: dict[str, nn.Module]) -> None:
    """Replaces layers as :func:`factorize_` does, but gives dense ones their parameters, which are in files.

    Args:
        model: the model; changed in place.
        built: the new layers, by name.
    """
    own = dict(model.named_modules())
    fitted = {name: new for name, new in built.items() if not is_factored(new)}
    with opened_attentions(model):
        for name, new in fitted.items():
            dense = model.get_submodule(name)
            if own.get(name) is dense:
                dense._parameters.update(new._parameters)
            else:  # a projection of an attention that keeps several in one matrix
                write_(dense, weight_of(new), bias_of(new))
    replace_(model, {name: new for name, new in built.items() if name not in fitted})


def write_model(model: nn.Module, target: Path, source: Path, plan: Plan) -> None:
    """Writes weights in shards, an index of them, the plan, and the small files beside.

    Args:
        model: the model.
        target: the folder to write to.
        source: the folder, or the file, of the dense model.
        plan: the plan.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    shared = shared_names(state)
    description = ModelDescription.of(model)
    header = {"version": VERSION, **description.to_json(), "shared": shared}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items() if name not in shared}
    last: list[Tensor] = []

    def tensor_of(name: str) -> Tensor:
        release_mapped(last)
        last[:] = [state[name]]
        return state[name]

    if source.is_dir():
        copy_small_files(source, target, description)
    plan.save(target / "plan.json")
    write_sharded(target, infos, tensor_of, {KEY: json.dumps(header)}, SHARD)


def copy_small_files(source: Path, target: Path, description: ModelDescription) -> None:
    """Copies what lies beside the weights: configuration, tokenizer. The configuration describes the low-rank layers.

    Args:
        source: the folder of the dense model.
        target: the folder to write to.
        description: the layers of the new model.
    """
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and ".index." not in file.name:
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)
                if file.name == "config.json":
                    _describe(temporary, description)


def _describe(path: Path, description: ModelDescription) -> None:
    """Adds to a ``config.json`` what transformers needs to build the low-rank layers."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if description.layers or description.resized:
        config["quantization_config"] = to_quantization_config(description)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
