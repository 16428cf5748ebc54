"""A cache as one safetensors file that describes itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, LowRankError
from ...files import replacing
from ..rope import Rotation
from ..serialize import layer_from, layer_to, settings_from, settings_to
from .layer import LowRankLayer
from .versions import exact_from, exact_to

if TYPE_CHECKING:
    from .cache import LowRankCache

KEY = "lowrank_layers.cache"
VERSION = 1


def save(cache: LowRankCache, path: str | os.PathLike[str]) -> None:
    """Settings, lengths and rotations into the metadata, everything else as tensors."""
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"save: the folder {path.parent} does not exist.")
    if any(isinstance(layer, LowRankLayer) and layer.kv is not None and layer.kv.waits for layer in cache.layers):
        raise CheckpointError("save: the budget is not shared yet, as there is only a prompt; generate a token first.")
    rotations = list(cache.rotations.values())
    layers, tensors = [], {f"rotations.{i}": rotation.frequencies for i, rotation in enumerate(rotations)}
    for index, layer in enumerate(cache.layers):
        body, own = _layer_to(layer, rotations, index)
        layers.append(body)
        tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
    settings = settings_to(cache.settings)
    turned = [[rotation.interleaved, rotation.start] for rotation in rotations]
    body = {"version": VERSION, "settings": settings, "rotations": turned, "layers": layers, "depth": cache.depth}
    # safetensors refuses tensors that share memory, as rows of one buffer may
    owned = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(owned, temporary, metadata={"format": "pt", KEY: json.dumps(body)})


def load_into(cache: LowRankCache, path: str | os.PathLike[str], device: torch.device) -> None:
    """Fills a new cache."""
    path = Path(path)
    body, tensors = _read(path, device)
    try:
        if body["version"] != VERSION:
            raise CheckpointError(f"format version {body['version']!r}, expected {VERSION}; update the package")
        settings = settings_from(body["settings"])
        rotations = [
            Rotation(tensors.pop(f"rotations.{index}"), *turned) for index, turned in enumerate(body["rotations"])
        ]
        layers = []
        for index, layer in enumerate(body["layers"]):
            prefix = f"{index}."
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            layers.append(_layer_from(layer, own, settings, rotations))
        if tensors:
            raise CheckpointError(f"tensors {sorted(tensors)} that belong to no layer")
    except (LowRankError, AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        what = str(error) if isinstance(error, LowRankError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: is damaged, or not a cache: {what}.") from None
    cache.fill(settings, layers, rotations, body["depth"])


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CheckpointError(f"{path}: was not written by LowRankCache.save (no {KEY!r} in its metadata).")
            body = json.loads(metadata[KEY])
            return body, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no safetensors file: {error}") from None


def _layer_to(layer: Any, rotations: list[Rotation], index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not isinstance(layer, LowRankLayer):
        return exact_to(layer, index)
    if layer.kv is None:
        return {"tokens": 0}, {}
    body, tensors = layer_to(layer.kv)
    turned = layer.kv.rotation
    return body | {"rotation": None if turned is None else rotations.index(turned)}, tensors


def _layer_from(body: dict[str, Any], tensors: dict[str, Tensor], settings: Any, rotations: list[Rotation]) -> Any:
    if "exact" in body:
        return exact_from(body, tensors)
    layer = LowRankLayer()
    if "rotation" in body:
        turned = body["rotation"]
        layer.kv = layer_from(body, tensors, settings, None if turned is None else rotations[turned])
        layer.is_initialized = True
    return layer
