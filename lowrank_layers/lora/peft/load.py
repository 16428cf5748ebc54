"""Reading the folders that PEFT and :func:`save_lora` write."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, LowRankError
from ...modules import named_tensors
from ..adapted_weight import AdaptedWeight
from ..adapter_file import AdapterFile, LoadedAdapter, differences, read_json, read_tensors, refuse
from ..mixed_groups import dora_ratio
from ..trainable_tokens import TokenRows, base_rows, find_tokens
from .config import Config, config_of
from .keys import (
    CONFIG,
    OLD_WEIGHTS,
    PREFIX,
    TOKENS,
    WEIGHTS,
    PeftWeight,
    embedding_keys,
    saved_modules,
    token_key,
    whole_keys,
)
from .target_modules import find_weights
from .tensors import decode, file_shapes, groups_of


def find_peft(model: nn.Module, path: Path, name: str | None) -> AdapterFile:
    """What a folder of PEFT has for a model.

    Args:
        model: the model that the names belong to.
        path: path of the folder.
        name: the adapter's name in the model, which must be new; ``None`` where its values are swapped.

    Raises:
        CheckpointError: if the files are torn or foreign, or belong to another model.
    """
    config, problems = config_of(read_json(path / CONFIG))
    if problems:
        refuse(path / CONFIG, problems)
    tensors = _tensors(path)
    weights, wraps, problems = find_weights(model, config)
    parts = ["a", "b"] + ["magnitude"] * config.use_dora + ["bias"] * config.lora_bias
    expected: dict[str, tuple[int, ...]] = {}
    for each in weights:
        rank, groups = config.rank(each.label), groups_of(each.weight.layout)
        if rank % groups:
            problems.append(f"{each.weight.owner!r} has {groups} groups, which do not divide its rank {rank}")
        shapes = file_shapes(each.weight, rank)
        expected |= {each.keys[part]: shapes[part] for part in parts}
    own = named_tensors(model)
    saved = saved_modules(model, config.modules_to_save or ())
    copied = whole_keys(model, "none", saved, wraps)
    biases = {k: place for k, place in whole_keys(model, config.bias, saved, wraps).items() if k not in copied}
    frozen = {k: place for k, place in embedding_keys(model, wraps).items() if k in tensors and k not in copied}
    expected |= {key: tuple(own[place].shape) for key, place in (copied | biases | frozen).items()}
    tokens, keys, trouble = _find_tokens(model, config, tensors, name, {*wraps, *saved})
    expected |= keys
    problems += trouble + differences(tensors, expected)
    if problems:
        refuse(path, problems)
    for setting, patterns in config.unmatched(each.label for each in weights).items():
        warnings.warn(
            f"{path / CONFIG}: {setting} has the keys {patterns}, which match no layer of the adapter and are ignored.",
            stacklevel=4,
        )
    adapters = [_decoded(each, config, {part: tensors[each.keys[part]] for part in parts}) for each in weights]
    _fill_tokens(tokens, tensors)
    return AdapterFile(adapters, tensors, biases, saved, copied, frozen, tokens)


def _tensors(path: Path) -> dict[str, Tensor]:
    file = next((path / name for name in (WEIGHTS, OLD_WEIGHTS) if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path}: has neither {WEIGHTS} nor {OLD_WEIGHTS}.")
    return _without_adapter_name(file, read_tensors(file))


_NAMED = (
    re.compile(r"(?P<head>.+\.lora_[AB])\.(?P<name>[^.]+)(?P<tail>\.(?:weight|bias))"),
    re.compile(r"(?P<head>.+\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<tail>)"),
    re.compile(r"(?P<head>.+\.lora_magnitude_vector)\.(?P<name>[^.]+)(?P<tail>)\.weight"),
    re.compile(r"(?P<head>.+\.token_adapter\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<tail>)"),
    re.compile(r"(?P<head>.+)\.modules_to_save\.(?P<name>[^.]+)(?P<tail>\..+)"),
)


def _without_adapter_name(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys as ``save_pretrained`` writes them, where a state dict was saved with the adapter's name in them."""
    names: set[str] = set()
    found = {}
    for key, tensor in tensors.items():
        match = next((match for pattern in _NAMED if (match := pattern.fullmatch(key))), None)
        found[match["head"] + match["tail"] if match else key] = tensor
        names |= {match["name"]} if match else set()
    if len(names) > 1:
        raise CheckpointError(f"{path}: has several adapters ({sorted(names)}); save each on its own.")
    return found


def _decoded(each: PeftWeight, config: Config, given: Mapping[str, Tensor]) -> LoadedAdapter:
    """The adapter of one weight in our layout."""
    weight, scaling = each.weight, config.scaling(each.label)
    pair = decode(weight, given["a"], given["b"])
    magnitude = given["magnitude"].flatten() if "magnitude" in given else None
    groups, base = groups_of(weight.layout), weight.base
    if magnitude is not None and groups > 1 and not base.is_meta:
        magnitude = magnitude * dora_ratio(base, given["a"], given["b"], scaling, groups).cpu()
    bias = given["bias"] * scaling if "bias" in given else None
    a, b = pair or (given["a"], given["b"])
    return LoadedAdapter(weight, a, b, scaling, config.lora_dropout, magnitude, bias, mixes_groups=pair is None)


def _find_tokens(
    model: nn.Module, config: Config, tensors: Mapping[str, Tensor], name: str | None, taken: Iterable[str]
) -> tuple[dict[AdaptedWeight, TokenRows], dict[str, tuple[int, ...]], list[str]]:
    """The rows that are trained on their own, the shapes of what the file must have of them, and what is wrong."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, {}, []
    ties = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if isinstance(wanted, dict) and ties:
        # PEFT writes what tied layers share once
        first = {str(indices): key for key, indices in reversed(wanted.items())}
        ends = tuple(key.removeprefix(PREFIX).removesuffix(TOKENS) for key in tensors if key.endswith(TOKENS))
        wanted = {k: own for k, own in wanted.items() if first[str(own)] == k or any(end.endswith(k) for end in ends)}
    try:
        tokens = find_tokens(model, wanted, name, taken, ties=ties)
    except LowRankError as error:
        return {}, {}, [str(error).removeprefix("add_lora_: ").removesuffix(".")]
    firsts = {id(rows.rows): weight for weight, rows in reversed(tokens.items())}
    keys = {token_key(w.owner): tuple(rows.rows.shape) for w, rows in tokens.items() if firsts[id(rows.rows)] == w}
    return tokens, keys, []


@torch.no_grad()
def _fill_tokens(tokens: Mapping[AdaptedWeight, TokenRows], tensors: Mapping[str, Tensor]) -> None:
    """Puts the file's rows in, as differences from those of the base."""
    for weight, rows in tokens.items():
        if token_key(weight.owner) in tensors:
            base = base_rows(weight, rows.tokens)
            rows.rows.copy_(tensors[token_key(weight.owner)].to(base) - base)
