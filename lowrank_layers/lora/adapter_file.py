"""Files of adapters as values: read as a whole, and compared, before anything is done with them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError
from .adapted_weight import AdaptedWeight
from .trainable_tokens import TokenRows

_SHOWN = 8


@dataclass(frozen=True)
class LoadedAdapter:
    """The adapter that a file has for one weight.

    Args:
        weight: the weight of the model that it belongs to.
        a: ``A`` in the layout of :class:`Adapter`.
        b: ``B`` likewise.
        scaling: what the product is multiplied by.
        dropout: on the input of ``A``, in training.
        magnitude: the lengths of the weight's outputs (DoRA).
        bias: added to the output.
        mixes_groups: whether ``A`` reads the channels of all groups of a convolution.
    """

    weight: AdaptedWeight
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    mixes_groups: bool = False


@dataclass(frozen=True)
class AdapterFile:
    """All that a file holds for one model. The dictionaries lead from keys of the file to names in the model.

    Args:
        adapters: the low-rank ones.
        tensors: what is in the file, by key.
        base: parameters and buffers of the base that were trained with the adapter.
        saved: names of the modules that the adapter has copies of.
        copied: the parameters and buffers of these copies.
        embeddings: frozen embeddings of the base.
        tokens: rows of embeddings that are trained on their own.
    """

    adapters: list[LoadedAdapter]
    tensors: dict[str, Tensor]
    base: dict[str, str] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    tokens: dict[AdaptedWeight, TokenRows] = field(default_factory=dict)


def refuse(path: Path, problems: list[str]) -> NoReturn:
    """Raises one error with all that is wrong with a file."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise CheckpointError(
        f"{path}: does not fit: {'; '.join(problems[:_SHOWN])}{more}. Nothing was loaded; the model is unchanged."
    )


def read_json(path: Path) -> Any:
    """The settings of an adapter.

    Raises:
        CheckpointError: if the file is missing or torn.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; expected a folder that save_lora or PEFT wrote.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no JSON: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that ``torch.save`` wrote, by key.

    Raises:
        CheckpointError: if the file is torn, or holds something else.
    """
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
    """Missing and unknown keys, wrong shapes, and tensors with entries that are not finite, in words."""
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


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all entries are finite floating point numbers."""
    return all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
