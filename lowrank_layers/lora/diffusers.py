"""LoRA files of diffusers, kohya's scripts and ComfyUI: one file, often for several models, without PEFT's settings."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import is_compressed
from .adapted_weight import AdaptedWeight, base_modules
from .adapter_file import AdapterFile, LoadedAdapter, all_finite, refuse
from .diffusion_keys import Component, components_of, naming_of, spellings
from .peft.config import Config, config_of
from .peft.tensors import file_shapes
from .stable_diffusion import original_names
from .weight_layout import Kernel

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives to its files."""


def find_diffusion(
    model: nn.Module,
    path: Path,
    tensors: dict[str, Tensor],
    *,
    rank: int | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
) -> AdapterFile:
    """The adapters of such a file that belong to a model.

    Args:
        model: one of the pipeline's models.
        path: path of the file, for messages and its metadata.
        tensors: what is in the file.
        rank: rank of all adapters, where it is to be checked.
        alpha: scale of the products where neither keys nor metadata have one; without any they are added as they are.
        prefix: prefix of the keys that belong to this model; may be left out where only those of one model fit.

    Raises:
        CheckpointError: if the file is for another model, or holds something that is not supported.
    """
    components, problems = components_of(tensors)
    if prefix is not None:
        wanted = prefix.rstrip("._")
        if wanted not in components:
            known = ", ".join(map(repr, components))
            raise CheckpointError(f"{path}: got prefix={prefix!r}, expected one of {known}.")
        components = {wanted: components[wanted]}
    parts = [part for own in components.values() for part in own.parts.values()]
    if alpha is not None and any("alpha" in part for part in parts):
        problems.append(f"it has an alpha for its adapters, beside alpha={alpha!r}; leave that out")
    ranks = {len(part["a"]) for part in parts if "a" in part and part["a"].ndim}
    if rank is not None and ranks != {rank}:
        problems.append(f"its adapters have ranks {sorted(ranks)}, expected rank={rank!r}")
    if problems:
        refuse(path, problems)
    weights = _weights(model)
    tried = {key: _adapters(component, weights, path, alpha) for key, component in components.items()}
    fitting = [key for key, (_, wrong) in tried.items() if not wrong]
    if len(tried) > 1 and len(fitting) != 1:
        which = "several of which fit the model" if fitting else "none of which fits the model"
        first = [f"{key!r}: {wrong[0]}" for key, (_, wrong) in tried.items() if wrong]
        refuse(path, [f"it has adapters for {', '.join(map(repr, tried))}, {which}; give prefix= one of these", *first])
    found, wrong = tried[fitting[0]] if fitting else next(iter(tried.values()))
    if wrong:
        refuse(path, wrong)
    return AdapterFile(found, tensors)


def _weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """The weights of a model by all the names that files have for their modules, flat ones too."""
    modules = {name: module for name, module in base_modules(model).items() if name and _has_matrix(module)}
    weights = {name: AdaptedWeight(name, "weight", module) for name, module in modules.items()}
    for original, name in original_names(list(modules)).items():
        weights.setdefault(original, weights[name])
    flat: dict[str, set[AdaptedWeight]] = defaultdict(set)
    for name, weight in weights.items():
        flat[name.replace(".", "_")].add(weight)
    # where two layers have one flat name, neither can be meant
    return {name: next(iter(own)) for name, own in flat.items() if len(own) == 1} | weights


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_compressed(module) or (weight is not None and weight.ndim > 1)


def _adapters(
    component: Component, weights: Mapping[str, AdaptedWeight], path: Path, alpha: float | None
) -> tuple[list[LoadedAdapter], list[str]]:
    """The adapters of one model, and what does not fit, in words."""
    config, problems = _settings(path, component.prefix)
    found: dict[AdaptedWeight, LoadedAdapter] = {}
    separator = "_" if component.flat else "."
    for name, part in component.parts.items():
        tries = spellings(component.prefix, name, separator)
        weight = next((weights[each] for each in tries if each in weights), None)
        if weight is None:
            problems.append(f"an adapter of {name!r}{naming_of(name)}, which the model has not")
            continue
        if weight in found:
            problems.append(f"two adapters of {weight.owner!r}")
            continue
        loaded = _adapter(weight, part, alpha, config)
        if isinstance(loaded, str):
            problems.append(loaded)
        else:
            found[weight] = loaded
    return list(found.values()), problems


def _adapter(
    weight: AdaptedWeight, part: Mapping[str, Tensor], alpha: float | None, config: Config | None
) -> LoadedAdapter | str:
    """The adapter of a weight, or what is wrong with it, in words."""
    name, layout = weight.owner, weight.layout
    if not {"a", "b"} <= part.keys():
        return f"{name!r} lacks its factor {'down (A)' if 'b' in part else 'up (B)'}"
    if isinstance(layout, Kernel) and (layout.transposed or layout.groups > 1):
        return f"{name!r} is a convolution that is transposed or has groups, whose adapters these files do not define"
    if not all_finite(part):
        return f"{name!r} has entries that are no finite floating point numbers"
    rank = part["a"].shape[0] if part["a"].ndim else 0
    shapes = file_shapes(weight, rank)
    given = {}
    for key in ("a", "b"):
        # a pointwise convolution's factors may lie as matrices, and a linear layer's as pointwise convolutions
        value = part[key]
        if _trimmed(tuple(value.shape)) != _trimmed(shapes[key]):
            return (
                f"{'down' if key == 'a' else 'up'} of {name!r} has shape {tuple(value.shape)}, expected {shapes[key]}"
            )
        given[key] = value.reshape(shapes[key])
    magnitude = part.get("magnitude")
    if magnitude is not None:
        out = math.prod(shapes["magnitude"])
        if magnitude.numel() != out or (magnitude.shape[0] != out and tuple(magnitude.shape) != shapes["magnitude"]):
            return (
                f"the DoRA scale of {name!r} has shape {tuple(magnitude.shape)}, expected one number for each of its"
                f" {out} outputs"
            )
        magnitude = magnitude.flatten()
    own = part.get("alpha")
    if own is not None and own.numel() != 1:
        return f"alpha of {name!r} has shape {tuple(own.shape)}, expected one number"
    if own is not None:
        scaling = float(own) / rank
    elif config is not None:
        scaling = config.scaling(name)
    else:
        scaling = 1.0 if alpha is None else float(alpha) / rank
    return LoadedAdapter(weight, given["a"], given["b"], scaling, magnitude=magnitude)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones behind its first two sizes."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _settings(path: Path, prefix: str) -> tuple[Config | None, list[str]]:
    """The settings that newer files of diffusers have in their header for one of the models, and what is wrong."""
    if path.suffix != ".safetensors":
        return None, []
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return None, []
    try:
        body: Any = json.loads(text)
    except ValueError:
        return None, ["its metadata 'lora_adapter_metadata' is no JSON"]
    start = f"{prefix}." if prefix else ""
    own = {key[len(start) :]: value for key, value in body.items() if key.startswith(start)}
    return config_of({"peft_type": "LORA", "target_modules": [], **own}) if "r" in own else (None, [])
