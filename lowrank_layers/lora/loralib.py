"""Files of loralib (``fc.lora_A``) and torchtune (``fc.lora_a.weight``): no settings, names as in the model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..checks import is_number
from ..errors import CheckpointError
from ..modules import named_tensors
from .adapted_weight import AdaptedWeight, base_modules
from .adapter_file import AdapterFile, LoadedAdapter, all_finite, differences, refuse
from .peft.keys import PREFIX
from .peft.tensors import file_shapes
from .weight_layout import Matrix

_FACTORS = {"lora_A": "a", "lora_B": "b", "lora_a.weight": "a", "lora_b.weight": "b"}
_KEY = re.compile(rf"(?P<path>.+)\.(?P<factor>{'|'.join(map(re.escape, _FACTORS))})")


def find_loralib(
    model: nn.Module, path: Path, tensors: dict[str, Tensor], *, rank: int | None, alpha: float | None
) -> AdapterFile:
    """The adapters of such a file, and the parameters of the base that were trained with them.

    Args:
        model: the model that the names belong to.
        path: path of the file, for messages.
        tensors: what is in the file.
        rank: rank of all adapters, where it is to be checked.
        alpha: the products are scaled by ``alpha / rank``.

    Raises:
        CheckpointError: if the file is of another kind or for another model.
    """
    if any(key.startswith(PREFIX) for key in tensors):
        raise CheckpointError(f"{path}: is one of PEFT's files; give the folder, which has its settings too.")
    if not any(_KEY.fullmatch(key) for key in tensors):
        raise CheckpointError(
            f"{path}: has no adapter in a form that is known (PEFT, diffusers, kohya, ComfyUI, loralib, torchtune); its"
            f" keys are like {next(iter(tensors), None)!r}. Convert it to PEFT's form first."
        )
    if not is_number(alpha):
        raise CheckpointError(
            f"{path}: got alpha {alpha!r}, expected the number that it was trained with, which it does not hold."
        )
    modules, own = base_modules(model), named_tensors(model)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    base: dict[str, str] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        owner, _, last = key.rpartition(".")
        if match:
            parts[match["path"]][_FACTORS[match["factor"]]] = tensor
        elif last == "magnitude" and owner in modules and key not in own:
            parts[owner]["magnitude"] = tensor
        elif key in own:
            base[key] = key
        else:
            problems.append(f"unknown {key!r}")
    adapters = []
    for name, part in parts.items():
        if name not in modules:
            problems.append(f"an adapter of {name!r}, which the model has not")
            continue
        weight = AdaptedWeight(name, "weight", modules[name])
        trouble = _trouble(weight, part, rank)
        if trouble:
            problems.append(trouble)
            continue
        scaling = float(alpha) / part["a"].shape[0]
        adapters.append(LoadedAdapter(weight, part["a"], part["b"], scaling, magnitude=part.get("magnitude")))
    problems += differences({key: tensors[key] for key in base}, {key: tuple(own[key].shape) for key in base})
    if problems:
        refuse(path, problems)
    return AdapterFile(adapters, tensors, base)


def _trouble(weight: AdaptedWeight, part: Mapping[str, Tensor], rank: int | None) -> str | None:
    """What is wrong with the adapter of a weight, in words."""
    name, kind = weight.owner, type(weight.module).__name__
    if not isinstance(getattr(weight.module, "weight", None), Tensor):
        return f"{name!r} is a {kind}, which has no weight"
    if not isinstance(weight.layout, Matrix):
        return f"{name!r} is a {kind}; without settings only linear layers and embeddings can be read"
    if not {"a", "b"} <= part.keys():
        return f"{name!r} has only one of A and B"
    a, b = part["a"], part["b"]
    if a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
        return (
            f"{name!r} has A {tuple(a.shape)} and B {tuple(b.shape)}: loralib's MergedLinear, whose parts the file does"
            " not name; split it into one adapter per projection"
        )
    own_rank = a.shape[0] if rank is None and a.ndim else rank
    for key, shape in file_shapes(weight, own_rank or 0).items():
        if key in part and tuple(part[key].shape) != shape:
            return f"{key} of {name!r} has shape {tuple(part[key].shape)}, expected {shape}"
    return None if all_finite(part) else f"{name!r} has entries that are no finite floating point numbers"
