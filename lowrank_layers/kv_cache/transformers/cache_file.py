"""A cache as one safetensors file that describes itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, LowRankError
from ...files import read_tensors, write_tensors
from ..bit_coefficients import PER_OCTAVE
from ..rope import Rotation
from ..serialize import layer_from_tensors, layer_to_tensors, settings_from_json, settings_to_json
from ..settings import KVSettings
from .layer import LowRankLayer
from .versions import exact_layer_from_tensors, exact_layer_to_tensors

KEY = "lowrank_layers.cache"
VERSION = 2


@dataclass(frozen=True)
class CacheContents:
    """What a file holds of a cache.

    Args:
        settings: settings of the low-rank layers.
        layers: all layers, also those that transformers itself makes.
        rotations: the rotations that layers share.
        depth: number of layers of the model, if it is known.
    """

    settings: KVSettings
    layers: list[Any]
    rotations: list[Rotation]
    depth: int | None


def save(contents: CacheContents, path: str | os.PathLike[str]) -> None:
    """Writes settings, lengths and rotations into the metadata, everything else as tensors.

    Args:
        contents: what is written.
        path: the file.

    Raises:
        CheckpointError: for a folder that does not exist, and layers that cannot be saved.
    """
    rotations = contents.rotations
    layers, tensors = [], {f"rotations.{i}": rotation.frequencies for i, rotation in enumerate(rotations)}
    for index, layer in enumerate(contents.layers):
        body, own = _layer_to_tensors(layer, rotations, index)
        layers.append(body)
        tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
    settings = settings_to_json(contents.settings)
    turned = [[rotation.interleaved, rotation.start] for rotation in rotations]
    body = {"version": VERSION, "settings": settings, "rotations": turned, "layers": layers, "depth": contents.depth}
    # safetensors refuses tensors that share memory, as rows of one buffer may
    owned = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    write_tensors(Path(path), owned, KEY, body)


def load(path: str | os.PathLike[str], device: torch.device) -> CacheContents:
    """Inverse of :func:`save`.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        CheckpointError: for a file that is missing, torn or foreign.
    """
    path = Path(path)
    foreign = f"was not written by LowRankCache.save (no {KEY!r} in its metadata)."
    body, held = read_tensors(path, KEY, foreign, str(device))
    # copies are aligned as tensors are made, which decides the last digits of products
    tensors = {name: tensor.clone() for name, tensor in held.items()}
    try:
        if body["version"] not in (1, VERSION):
            raise CheckpointError(f"format version {body['version']!r}, expected {VERSION}; update the package")
        if body["version"] == 1:  # gains were by powers of the square root of two
            tensors = {k: t * (PER_OCTAVE // 2) if k.endswith(".gains") else t for k, t in tensors.items()}
        settings = settings_from_json(body["settings"])
        rotations = [
            Rotation(tensors.pop(f"rotations.{index}"), *turned) for index, turned in enumerate(body["rotations"])
        ]
        layers = []
        for index, layer in enumerate(body["layers"]):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            layers.append(_layer_from_tensors(layer, own, settings, rotations))
        if tensors:
            raise CheckpointError(f"tensors {sorted(tensors)} that belong to no layer")
    except (LowRankError, AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        what = str(error) if isinstance(error, LowRankError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: is damaged, or not a cache: {what}.") from None
    return CacheContents(settings, layers, rotations, body["depth"])


def _layer_to_tensors(layer: Any, rotations: list[Rotation], index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(layer, LowRankLayer):
        return exact_layer_to_tensors(layer, index)
    if layer.kv is None:
        return {"tokens": 0}, {}
    if layer.kv.waits_for_budget:
        raise CheckpointError("save: the budget is not shared yet, as there is only a prompt; generate a token first.")
    body, tensors = layer_to_tensors(layer.kv)
    turned = layer.kv.rotation
    return body | {"rotation": None if turned is None else rotations.index(turned)}, tensors


def _layer_from_tensors(
    body: dict[str, Any], tensors: dict[str, Tensor], settings: KVSettings, rotations: list[Rotation]
) -> Any:
    if "exact" in body:
        return exact_layer_from_tensors(body, tensors)
    layer = LowRankLayer()
    if "rotation" in body:
        turned = body["rotation"]
        layer.kv = layer_from_tensors(body, tensors, settings, None if turned is None else rotations[turned])
        layer.is_initialized = True
    return layer
