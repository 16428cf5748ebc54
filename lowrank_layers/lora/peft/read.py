"""Files of adapters, read as a whole before anything is done with them; those without settings too."""

from __future__ import annotations

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import CheckpointError
from ..adapted_weight import AdaptedWeight
from ..tokens import TokenRows
from ..weight_layout import Matrix
from .keys import PREFIX, Slot, modules_of

_SHOWN = 8


class Read(NamedTuple):
    """One adapter of a file: our ``A`` and ``B``, what their product is multiplied by, and the rest.

    ``mixed`` says that ``A`` reads the channels of all groups of a convolution.
    """

    slot: Slot
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    mixed: bool = False


@dataclass(frozen=True)
class Whole:
    """What a file holds beside adapters: its keys, with our names of what they belong to.

    Args:
        base: parameters and buffers of the base that were trained.
        saved: the modules that the adapter has copies of.
        copied: their parameters and buffers.
        embeddings: those of the base that are frozen.
        tokens: rows of embeddings that are trained on their own, by the weights that they belong to.
    """

    base: dict[str, str]
    saved: list[str] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    tokens: dict[AdaptedWeight, TokenRows] = field(default_factory=dict)


def refuse(path: Path, problems: list[str]) -> NoReturn:
    """All that is wrong, in one error."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise CheckpointError(
        f"{path}: does not fit: {'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded; the model is unchanged."
    )


def read_json(path: Path) -> Any:
    """The settings of an adapter."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; expected a folder that save_lora or PEFT wrote.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no JSON: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or one of ``torch.save`` that holds tensors by name."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        body = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        text = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: is torn or no file of tensors: {text}") from None
    if not isinstance(body, Mapping) or not all(isinstance(value, Tensor) for value in body.values()):
        raise CheckpointError(f"{path}: holds a {type(body).__name__}, expected tensors by name.")
    return dict(body)


def differences(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Missing and unknown keys, wrong shapes, what is no number."""
    problems = [f"missing {key!r}" for key in expected if key not in tensors]
    problems += [f"unknown {key!r}" for key in tensors if key not in expected and ".original_module." not in key]
    for key in expected.keys() & tensors.keys():
        tensor = tensors[key]
        if tuple(tensor.shape) != expected[key]:
            problems.append(f"{key!r} has shape {tuple(tensor.shape)}, expected {expected[key]}")
        elif "lora_" in key and not tensor.is_floating_point():
            problems.append(f"{key!r} is {tensor.dtype}, expected floating point")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{key!r} has NaN or Inf entries")
    return problems


_NAMED = (
    re.compile(r"(?P<head>.+\.lora_[AB])\.(?P<name>[^.]+)(?P<tail>\.(?:weight|bias))"),
    re.compile(r"(?P<head>.+\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<tail>)"),
    re.compile(r"(?P<head>.+\.lora_magnitude_vector)\.(?P<name>[^.]+)(?P<tail>)\.weight"),
    re.compile(r"(?P<head>.+\.token_adapter\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<tail>)"),
    re.compile(r"(?P<head>.+)\.modules_to_save\.(?P<name>[^.]+)(?P<tail>\..+)"),
)


def without_adapter_name(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys as ``save_pretrained`` writes them, where a state dict was saved with the adapter's name in them.

    Raises:
        CheckpointError: if it has several adapters.
    """
    names: set[str] = set()
    found = {}
    for key, tensor in tensors.items():
        match = next((match for pattern in _NAMED if (match := pattern.fullmatch(key))), None)
        found[match["head"] + match["tail"] if match else key] = tensor
        names |= {match["name"]} if match else set()
    if len(names) > 1:
        raise CheckpointError(f"{path}: has several adapters ({sorted(names)}); save each on its own.")
    return found


_NAMES = {"lora_A": "a", "lora_B": "b", "lora_a.weight": "a", "lora_b.weight": "b", "magnitude": "magnitude"}
_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_a\.weight|lora_b\.weight)")


def find_plain(
    model: nn.Module, path: Path, tensors: dict[str, Tensor], rank: int | None, alpha: float | None
) -> tuple[list[Read], Whole, dict[str, Tensor]]:
    """What loralib (``fc.lora_A``) and torchtune (``fc.lora_a.weight``) wrote: no settings, parameters by our names.

    Returns:
        The adapters, the whole parameters, and the tensors.
    """
    if any(key.startswith(PREFIX) for key in tensors):
        raise CheckpointError(f"{path}: is one of PEFT's files; give the folder, which has its settings too.")
    if not any(_KEY.fullmatch(key) for key in tensors):
        raise CheckpointError(
            f"{path}: has no adapter in a form that is known (PEFT, diffusers, kohya, ComfyUI, loralib, torchtune); its"
            f" keys are like {next(iter(tensors), None)!r}. Convert it to PEFT's form first."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: got alpha {alpha!r}, expected the number it was trained with: it says none.")
    modules = modules_of(model)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    whole: dict[str, str] = {}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        owner, _, last = key.rpartition(".")
        if match:
            parts[match["path"]][_NAMES[match["part"]]] = tensor
        elif last == "magnitude" and owner in modules and key not in own:
            parts[owner]["magnitude"] = tensor
        elif key in own:
            whole[key] = key
        else:
            problems.append(f"unknown {key!r}")
    found = []
    for name, part in parts.items():
        trouble = _trouble(name, part, modules.get(name), rank)
        if trouble:
            problems.append(trouble)
            continue
        slot = Slot(name, "weight", modules[name], name, name)
        scaling = float(alpha) / part["a"].shape[0]
        found.append(Read(slot, part["a"], part["b"], scaling, magnitude=part.get("magnitude")))
    expected = {key: tuple(own[key].shape) for key in whole}
    problems += differences({key: tensors[key] for key in whole}, expected)
    if problems:
        refuse(path, problems)
    return found, Whole(whole), tensors


def _trouble(name: str, part: dict[str, Tensor], module: nn.Module | None, rank: int | None) -> str | None:
    """What is wrong with one adapter."""
    if module is None:
        return f"an adapter of {name!r}, which the model has not"
    if not isinstance(getattr(module, "weight", None), Tensor):
        return f"{name!r} is a {type(module).__name__}, which has no weight"
    slot = Slot(name, "weight", module, name, name)
    if not isinstance(slot.kind, Matrix):
        return f"{name!r} is a {type(module).__name__}; without settings only linear layers and tables can be read"
    if not {"a", "b"} <= part.keys():
        return f"{name!r} has only one of A and B"
    a, b = part["a"], part["b"]
    if a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
        return (
            f"{name!r} has A {tuple(a.shape)} and B {tuple(b.shape)}: loralib's MergedLinear, whose parts the file does"
            " not name; split it into one adapter a projection"
        )
    own_rank = a.shape[0] if rank is None and a.ndim else rank
    for key, shape in slot.shapes(own_rank or 0).items():
        if key in part and tuple(part[key].shape) != shape:
            return f"{key} of {name!r} has shape {tuple(part[key].shape)}, expected {shape}"
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in part.values()):
        return f"{name!r} has entries that are no finite floating point numbers"
    return None
