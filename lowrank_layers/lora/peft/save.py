"""``save_lora``: writing adapters as PEFT does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import CheckpointError, LowRankError, UnsupportedLayerError
from ...files import replacing
from ...layers import is_compressed
from ...modules import check_model, named_tensors
from ..adapted_weight import base_modules
from ..attach import choose_name
from ..module_copies import copied_tensors, copies_of
from ..trainable_tokens import base_rows
from ..weight_layout import is_conv1d
from .collect import collect_adapters, collect_tokens
from .config import BIASES
from .encode import encoded, target_settings
from .keys import (
    CONFIG,
    EMBEDDING_MARK,
    TRAINED_MARK,
    WEIGHTS,
    embedding_keys,
    peft_weights,
    saved_modules,
    token_key,
    whole_keys,
)

Bias = Literal["none", "all", "lora_only"]
_NEWER = ("lora_bias", "target_parameters", "trainable_token_indices")
"""Settings that older versions of PEFT do not know."""


def save_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    modules_to_save: Iterable[str] | None = None,
    bias: Bias | None = None,
) -> None:
    """Writes an adapter in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained`` loads it onto the plain base. An adapter that starts from singular values is written
    with twice the rank, so that its start is subtracted. Both files are written under temporary names and renamed.

    Args:
        model: an adapted model.
        folder: folder to write to, which is made where it is missing.
        name: name of the adapter; may be left out where there is one only.
        modules_to_save: names, or ends of names, of modules of the base to write as a whole, running statistics
            included. By default those outside the adapters whose parameters learn. What the adapter itself trains whole
            (``add_lora_(modules_to_save=)``) is always written.
        bias: which biases of the base to write: ``"none"``, ``"lora_only"``, ``"all"``; by default those that learn.

    Raises:
        UnsupportedLayerError: listing the layers that PEFT has no adapters for (factored, recurrent, transposed).
        LowRankError: for an unknown name.
        CheckpointError: if the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> fresh = nn.Sequential(nn.Linear(8, 6))
        >>> _ = fresh.load_state_dict(base.state_dict())
        >>> model = lr.add_lora_(base, rank=2, init="pissa")
        >>> lr.save_lora(model, folder)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(lr.load_lora(fresh, folder)(x), model(x), atol=1e-6)
        True
    """
    check_model(model, quantized=True)
    name = choose_name(model, name, "save_lora")
    if bias not in (None, *BIASES):
        raise LowRankError(f"save_lora: got bias={bias!r}, expected one of {list(BIASES)}.")
    adapters, labels, problems = collect_adapters(model, name)
    tokens, more = collect_tokens(model, name)
    problems += more
    weights, wraps = peft_weights(base_modules(model), labels)
    trained, learned_bias, more = _trained_beside(model, wraps)
    problems += more
    saved = trained if modules_to_save is None else _known(model, modules_to_save)
    saved += [owner for owner, copies in copies_of(model).items() if name in copies]
    saved = [owner for owner in saved if not any(owner.startswith(f"{other}.") for other in saved)]
    modules = saved_modules(model, saved)
    problems += [
        f"{owner!r} whole and an adapter of {inner!r} too"
        for owner in modules
        for inner in wraps
        if f"{inner}.".startswith(f"{owner}.")
    ]
    if problems:
        raise UnsupportedLayerError(f"save_lora: PEFT's file cannot hold {'; '.join(problems)}.")
    config, tensors = encoded({each: adapters[each.weight] for each in weights})
    config.target_modules, config.target_parameters = target_settings(model, weights)
    config.trainable_token_indices = {weight.owner: rows.tokens.tolist() for weight, rows in tokens.items()} or None
    for weight, rows in tokens.items():
        tensors[token_key(weight.owner)] = base_rows(weight, rows.tokens) + rows.rows.detach()
    config.bias, config.modules_to_save = learned_bias if bias is None else bias, sorted(saved) or None
    own = named_tensors(model) | copied_tensors(model, name)
    for key, place in whole_keys(model, config.bias, modules, wraps).items():
        tensors[key] = own[place].detach()
    for key, place in embedding_keys(model, wraps).items():
        if hasattr(own[place], EMBEDDING_MARK):
            tensors.setdefault(key, own[place].detach())
    settings = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    settings["fan_in_fan_out"] = any(is_conv1d(weight.module) for weight in adapters)
    settings |= {k: v for k, v in asdict(config).items() if k not in _NEWER or v}
    _write(Path(folder), settings, tensors)


def _known(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names as a list, each of which must mean a module of the model."""
    chosen = list(names)
    unknown = [name for name in chosen if not saved_modules(model, [name])]
    if unknown:
        raise LowRankError(f"save_lora: got modules_to_save {unknown}, which the model has not.")
    return chosen


def _trained_beside(model: nn.Module, wraps: Mapping[str, int]) -> tuple[list[str], Bias, list[str]]:
    """The modules of the base that learn beside the adapters, which biases do, and what PEFT cannot write, in words."""
    whole: list[str] = []
    biases: list[str] = []
    problems = []
    for owner, module in base_modules(model).items():
        all_own = module.named_parameters(recurse=is_compressed(module))
        own = [(key, p) for key, p in all_own if ".lora_" not in f".{key}"]
        learned = [key for key, p in own if p.requires_grad or hasattr(p, TRAINED_MARK)]
        if learned == ["bias"] and (owner in wraps or len(own) > 1):
            biases.append(owner)
        elif learned and (owner in wraps or not owner):
            problems.append(f"what was learned of {owner!r} itself ({', '.join(learned)}) beside its adapter")
        elif learned:
            whole.append(owner)
    return whole, "none" if not biases else "lora_only" if set(biases) <= set(wraps) else "all", problems


def _write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of an adapter; where that fails, those that were there stay."""
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError("save_lora: a tensor is on the meta device and has no values to write.")
    files = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
            config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
            save_file(files, weights, metadata={"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"save_lora: cannot write to {folder}: {error}") from None
