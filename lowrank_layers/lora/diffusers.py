"""LoRA files of diffusers, kohya's scripts and ComfyUI: one file, often for several models, without PEFT's settings."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import is_factored
from .adapted_weight import AdaptedWeight, base_modules
from .adapter_file import AdapterFile, LoadedAdapter, all_finite, refuse
from .peft.config import Config, config_of
from .peft.tensors import file_shapes
from .stable_diffusion import original_names
from .weight_layout import Kernel

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives to its files."""

_DOWN = (
    r"\.lora_down\.weight",
    r"_lora\.down\.weight",
    r"\.lora\.down\.weight",
    r"\.lora_linear_layer\.down\.weight",
    r"\.lora_A(\.[^.]+)?\.weight",
    r"\.lora_A",
)
_UP = tuple(end.replace("down", "up").replace("_A", "_B") for end in _DOWN)
_PARTS = {
    "a": _DOWN,
    "b": _UP,
    "alpha": (r"\.alpha",),
    "magnitude": (r"\.dora_scale", r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?"),
}
_SUFFIXES = {part: re.compile(rf"(?P<path>.+?)({'|'.join(ends)})") for part, ends in _PARTS.items()}
_FOREIGN = {
    r".*\.lora_mid\.weight": "a convolution with a core (LoCon with lora_mid), which is no product of two factors",
    r".*\.hada_[wt]\d(_[ab])?": "a Hadamard product (LoHa)",
    r".*\.lokr_[wt]\d(_[ab])?": "a Kronecker product (LoKr)",
    r".*\.(oft_\w+|boft_\w+)(\.weight)?": "an orthogonal transformation (OFT)",
    r".*\.[ab][12]\.weight": "GLoRA",
    r".*\.(diff|diff_b|set_weight|w_norm|b_norm)": "the difference of a whole parameter",
    r".*\.(reshape_weight)": "a weight of another shape",
    r".*\.lora_[BA](\.[^.]+)?\.bias": "a bias of an adapter",
}
_FLAT = re.compile(r"(?P<prefix>lora_(?:prior_)?(?:unet|transformer|te\d?)|lycoris)_(?P<path>.+)")
_DOTTED = re.compile(
    r"(?P<prefix>(?:model\.)?diffusion_model|unet|prior|transformer(?:_\d)?|text_encoder(?:_\d)?"
    r"|text_encoders\.[^.]+(?:\.transformer)?)\.(?P<path>.+)"
)
_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_NO = torch.zeros(())
_WRAPPERS = ("", "model.", "text_model.")


@dataclass
class Component:
    """What a file has for one of the models of a pipeline: the parts of each adapter, by the name in the file."""

    prefix: str
    parts: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    flat: bool = False  # kohya's names have "_" in place of "."


def is_diffusion_file(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of diffusers, kohya or ComfyUI, and not PEFT's, loralib's or torchtune's."""
    if any(key.startswith("base_model.model.") for key in tensors):
        return False
    ends = (*_DOWN[:-1], *_UP[:-1], *_FOREIGN)
    return any(re.fullmatch(rf".+?{end}", key) for key in tensors for end in ends)


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
        path: of the file.
        tensors: what is in it.
        rank: of all adapters, where it is to be checked.
        alpha: where neither keys nor metadata have one; without any, the product is added as it is.
        prefix: of the keys that belong to this model; may be left out where only those of one fit.
    """
    components, problems = _components(tensors)
    if prefix is not None:
        wanted = prefix.rstrip("._")
        if wanted not in components:
            known = ", ".join(map(repr, components))
            raise CheckpointError(f"{path}: got prefix={prefix!r}, expected one of {known}.")
        components = {wanted: components[wanted]}
    if alpha is not None and any("alpha" in part for own in components.values() for part in own.parts.values()):
        problems.append(f"it has an alpha for its adapters, beside alpha={alpha!r}; leave that out")
    ranks = {len(part["a"]) for own in components.values() for part in own.parts.values() if part.get("a", _NO).ndim}
    if rank is not None and ranks != {rank}:
        problems.append(f"its adapters have ranks {sorted(ranks)}, expected rank={rank!r}")
    if problems:
        refuse(path, problems)
    names = _names(model)
    tried = {key: _read(component, names, path, alpha) for key, component in components.items()}
    fitting = [key for key, (_, wrong) in tried.items() if not wrong]
    if len(tried) > 1 and len(fitting) != 1:
        which = "several of which fit the model" if fitting else "none of which fits the model"
        first = [f"{key!r}: {wrong[0]}" for key, (_, wrong) in tried.items() if wrong]
        refuse(path, [f"it has adapters for {', '.join(map(repr, tried))}, {which}; give prefix= one of these", *first])
    found, wrong = tried[fitting[0]] if fitting else next(iter(tried.values()))
    if wrong:
        refuse(path, wrong)
    return AdapterFile(found, tensors)


def _components(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Component], list[str]]:
    """The parts of every adapter by the model that they belong to, and keys that say something else."""
    components: dict[str, Component] = {}
    problems = []
    for key, tensor in tensors.items():
        foreign = next((what for pattern, what in _FOREIGN.items() if re.fullmatch(pattern, key)), None)
        if foreign:
            problems.append(f"{key!r} is {foreign}, which is not supported")
            continue
        found = [(part, match["path"]) for part, regex in _SUFFIXES.items() if (match := regex.fullmatch(key))]
        if not found:
            problems.append(f"unknown {key!r}")
            continue
        part, path = found[0]
        flat, dotted = _FLAT.fullmatch(path), _DOTTED.fullmatch(path)
        match = flat or dotted
        name = match["prefix"] if match else ""
        component = components.setdefault(name, Component(name, flat=flat is not None))
        component.parts[match["path"] if match else path][part] = tensor
    return components, problems


def _names(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Modules with a weight by all the names that files have for them, flat ones too."""
    names = {name: (name, module) for name, module in base_modules(model).items() if name and _has_matrix(module)}
    for original, name in original_names(list(names)).items():
        names.setdefault(original, names[name])
    flat: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, own in names.items():
        flat[name.replace(".", "_")].append(own)
    # two layers with one flat name: neither can be meant
    return {name: own[0] for name, own in flat.items() if len({each[0] for each in own}) == 1} | names


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return is_factored(module) or (weight is not None and weight.ndim > 1)


def _read(
    component: Component, names: Mapping[str, tuple[str, nn.Module]], path: Path, alpha: float | None
) -> tuple[list[LoadedAdapter], list[str]]:
    """The adapters of one model, and what does not fit, in words."""
    config, problems = _settings(path, component.prefix)
    found: dict[str, LoadedAdapter] = {}
    separator = "_" if component.flat else "."
    for name, part in component.parts.items():
        own = next((names[each] for each in _spellings(component.prefix, name, separator) if each in names), None)
        if own is None:
            problems.append(f"an adapter of {name!r}{_layout(name)}, which the model has not")
            continue
        if own[0] in found:
            problems.append(f"two adapters of {own[0]!r}")
            continue
        loaded = _adapter(AdaptedWeight(own[0], "weight", own[1]), part, alpha, config)
        if isinstance(loaded, str):
            problems.append(loaded)
        else:
            found[own[0]] = loaded
    return list(found.values()), problems


def _spellings(prefix: str, name: str, separator: str) -> Iterator[str]:
    """What the model may call a layer that the file calls so."""
    plain = name.replace(".processor.", ".")
    head, _, last = plain.rpartition(".")
    own = [name, plain, *([f"{head}.{_PROCESSOR[last]}"] if last in _PROCESSOR else [])]
    own += [f"{plain}.0"] if last == "to_out" else []
    for each in own:
        if separator == ".":
            yield f"{prefix}.{each}"
        for wrapper in _WRAPPERS:
            flat = wrapper.replace(".", separator)
            yield each.removeprefix(flat)
            yield flat + each


def _layout(name: str) -> str:
    """The naming of a layer, where it is one of those that have to be converted."""
    flat = name.replace(".", "_")
    if re.match(r"(input_blocks|middle_block|output_blocks)_", flat):
        return " (the naming of Stable Diffusion's original code)"
    if re.match(r"(double_blocks|single_blocks)_", flat):
        return " (the naming of Flux's original code)"
    if re.match(r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)_", flat):
        return " (the naming of diffusers)"
    return ""


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
    """Without the ones behind the first two sizes."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _settings(path: Path, prefix: str) -> tuple[Config | None, list[str]]:
    """What newer files of diffusers say of their adapters in the header, for one of the models."""
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
