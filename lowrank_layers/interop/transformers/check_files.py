"""Checks that the files of a folder hold the layers that its ``config.json`` describes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CheckpointError
from ...files import TensorInfo, read_infos
from ...layers import is_compressed, is_resized
from ...modules import walk_layers


def check_files(model: Any, files: Iterable[str]) -> None:
    """Raises if files are missing, torn, or hold other tensors for the layers than the model has, before any is read.

    Args:
        model: the model with its low-rank and resized layers, without values.
        files: the files of its weights; others than those of safetensors are passed over.

    Raises:
        CheckpointError: with the names of files or tensors.
    """
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{paths[0].parent}: {len(absent)} of {len(paths)} files of weights are missing: {_some(absent)};"
            " copy them from where the folder was saved."
        )
    held: dict[str, TensorInfo] = {}
    for path in paths:
        held.update(read_infos(path)[1])
    if held:
        _compare(model, held, paths[0].parent)


def _compare(model: Any, held: dict[str, TensorInfo], folder: Path) -> None:
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    state = {
        f"{name}.{key}": tensor
        for name, module in walk_layers(model)
        if _is_described(module)
        for key, tensor in module.state_dict().items()
    }
    problems = []
    for name, info in held.items():
        own = next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in state), None)
        if own is not None and tuple(state[own].shape) != info.shape:
            problems.append(f"{name!r} has shape {info.shape}, expected {tuple(state[own].shape)}")
        parent = name.rpartition(".")[0].rpartition(".")[0]
        if own is None and type(modules.get(parent)) in (nn.Linear, nn.Embedding):
            problems.append(f"{name!r} is a factor of a layer that config.json leaves dense")
    if problems:
        raise CheckpointError(
            f"{folder}: its weights do not fit the quantization_config in its config.json: {_some(problems)}; they are"
            " from different models. Save the model again with save_pretrained."
        )


def check_none_is_missing(model: Any) -> None:
    """Makes the loading of weights end in an error where a tensor of a low-rank or resized layer was in no file.

    transformers fills what is missing with random values and logs it. It names it to the model when it ties weights.

    Args:
        model: the model with its low-rank and resized layers, without values.
    """
    layers = {name: module for name, module in walk_layers(model) if _is_described(module)}
    own = {f"{name}.{key}" for name, module in layers.items() for key in module.state_dict()}

    def tie_weights(missing_keys: set[str] | None = None, **kwargs: Any) -> Any:
        del model.tie_weights  # the method of the class again
        absent = sorted(own & (missing_keys or set()))
        if absent:
            raise CheckpointError(
                f"{model.config.name_or_path}: its files lack {len(absent)} tensors of low-rank or resized"
                f" layers: {_some(absent)}; they are damaged or incomplete. Copy them from where the folder was saved."
            )
        return model.tie_weights(missing_keys=missing_keys, **kwargs)

    model.tie_weights = tie_weights


def _is_described(module: nn.Module) -> bool:
    return is_compressed(module) or is_resized(module)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")
