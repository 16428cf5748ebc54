"""Saving and loading: plain safetensors files that describe themselves."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError, LowRankError
from .files import replacing
from .layers import FACTORED_LAYERS, FactoredModule, LowRankMultiheadAttention, is_factored
from .layers.config import describe
from .modules import (
    check_can_be_filled,
    check_factors,
    check_model,
    fill_,
    module_aliases,
    open_attentions,
    openable_attentions,
    opened_attentions,
    reason_to_keep,
    replace_,
    separate,
    shared_names,
    tied_names,
    walk_layers,
)

KEY = "lowrank_layers"
"""The entry of the file's metadata that holds the ranks."""
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the state dict as safetensors, with every factored layer's kind and rank in the metadata.

    A tensor that has several names is stored once. Parameters must be finite; buffers may hold anything, such as the
    ``-inf`` of an attention mask. The file is written under a temporary name and renamed, so that it is never seen
    half done.

    Args:
        model: factored or not.
        path: the file, usually ``*.safetensors``.

    Raises:
        CheckpointError: if the state dict holds something that is no tensor, a tensor without values, a parameter with
            NaN or Inf entries, or tensors of which one is a part of another.

    Examples:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "small.safetensors")
        >>> small = nn.Sequential(lr.LowRankLinear(64, 32, rank=4))
        >>> lr.save(small, path)
        >>> loaded = lr.load(path, into=nn.Sequential(nn.Linear(64, 32)))
        >>> x = torch.randn(3, 64)
        >>> torch.equal(loaded(x), small(x))
        True
    """
    check_model(model)
    check_factors(model)
    path = Path(path)
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"save: {name!r} is a {type(tensor).__name__}, and safetensors hold tensors only.")
        if tensor.is_meta:
            raise CheckpointError(f"save: {name!r} is on the meta device and has no values to write.")
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"save: {name!r} is a {tensor.layout} tensor, expected a dense one; use .to_dense().")
        if not _may_be_stored(tensor):
            raise CheckpointError(
                f"save: the parameter {name!r} has NaN or Inf entries, expected finite ones; go back to a state before"
                " they appeared, or register what is meant to be infinite (a mask) as a buffer."
            )
    shared = shared_names(state)
    tensors = separate({name: tensor.detach() for name, tensor in state.items() if name not in shared})
    body = {"version": VERSION, "layers": _layers(model), "unfused": list(open_attentions(model)), "shared": shared}
    if not path.parent.is_dir():
        raise CheckpointError(f"save: the folder {path.parent} does not exist.")
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", KEY: json.dumps(body)})


def load(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Turns a freshly built dense model into the saved one, in place.

    Everything is read and compared first: names, kinds, ranks, shapes and dtypes. If anything does not fit, the
    error names it and the model is as it was. Parameters and buffers on the meta device are filled, and those that are
    one tensor in the model or were one in the saved model are one again.

    Args:
        path: what :func:`save` wrote.
        into: a model with the structure that the saved one had before it was factorized (or the factored one itself).

    Returns:
        The model ``into``.

    Raises:
        CheckpointError: if the file is torn, foreign, or for another model, or if the model has tensors on the meta
            device that no file holds, such as non-persistent buffers.
    """
    model = check_model(into)
    body, tensors = _read(Path(path))
    _check_attentions(model, body["unfused"], path)
    with opened_attentions(model, only=body["unfused"]):
        built = _build(model, body["layers"], path)
        state = _expected_state(model, built)
    for alias, name in body["shared"].items():
        if name not in tensors:
            raise CheckpointError(f"{path}: {alias!r} refers to {name!r}, which is not there; the file is damaged.")
        tensors[alias] = tensors[name]
    _compare(state, tensors, path)
    check_can_be_filled(model, state, path)
    found = openable_attentions(model)
    names = [name for name in body["unfused"] if name in found]
    replace_(model, {name: LowRankMultiheadAttention.from_dense(found[name], rank=None) for name in names})
    replace_(model, built)
    fill_(model, tensors, body["shared"])
    complete: OrderedDict[str, Tensor] = OrderedDict(tensors)
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(complete, strict=True)
    return model


def _check_attentions(model: nn.Module, names: Collection[str], path: object) -> None:
    """Raises where an attention has to be opened and cannot be."""
    closed = set(names) - set(openable_attentions(model))
    for name, module in model.named_modules(remove_duplicate=False):
        for part in module.modules() if name in closed and isinstance(module, nn.MultiheadAttention) else ():
            reason = reason_to_keep(part)
            if reason is not None:
                raise CheckpointError(f"{path}: {name!r} cannot be opened: {reason}.")


def _layers(model: nn.Module) -> dict[str, Any]:
    """Name to kind, rank, bias and the dense layer's settings."""
    layers = {}
    for name, module in walk_layers(model):
        if isinstance(module, FactoredModule):
            layers[name] = {
                "type": type(module).__name__,
                "rank": module.rank,
                "bias": module.bias is not None,
                "form": module.form,
                "dense": describe(module.dense_twin()),
            }
    return layers


def _may_be_stored(tensor: Tensor) -> bool:
    """The one rule of saving and loading: parameters are finite, buffers may hold anything."""
    if not isinstance(tensor, nn.Parameter):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no safetensors file: {error}") from None
    if KEY not in metadata:
        raise CheckpointError(
            f"{path}: was not written by lowrank_layers.save (no {KEY!r} in its metadata);"
            " load it with safetensors.torch.load_model."
        )
    try:
        body = json.loads(metadata[KEY])
        version, layers, shared = body["version"], body["layers"], body["shared"]
        body.setdefault("unfused", [])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {type(error).__name__}: {error}") from None
    if version != VERSION or not isinstance(layers, dict) or not isinstance(shared, dict):
        raise CheckpointError(f"{path}: has format version {version!r}, expected {VERSION}; update the package.")
    return body, tensors


def _build(model: nn.Module, layers: dict[str, Any], path: object) -> dict[str, nn.Module]:
    """The factored modules that the file asks for, uninitialized; none where the model has them already."""
    modules = dict(model.named_modules(remove_duplicate=False))
    built: dict[str, nn.Module] = {}
    for name, wanted in layers.items():
        module = modules.get(name)
        if module is None:
            raise CheckpointError(f"{path}: has a layer {name!r}, but the model has not; it is for another model.")
        try:
            kind = FACTORED_LAYERS[wanted["type"]]
            rank, bias, dense, form = wanted["rank"], wanted["bias"], wanted["dense"], dict(wanted.get("form", {}))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: {name!r}: its description {wanted!r} is damaged or newer.") from None
        rank = tuple(rank) if isinstance(rank, list) else rank
        if is_factored(module):
            if type(module) is not kind or (module.rank, module.form) != (rank, form):
                raise CheckpointError(
                    f"{path}: {name!r} is {wanted['type']} of rank {rank}, but the model has {type(module).__name__}"
                    f" of rank {module.rank}; load into the dense model."
                )
            continue
        if not kind.stands_for(module):
            raise CheckpointError(
                f"{path}: {name!r} replaces {kind.dense_name()}, but the model has a"
                f" {type(module).__name__}; it is for another model."
            )
        reason = reason_to_keep(module)
        if reason is not None:
            raise CheckpointError(f"{path}: {name!r} cannot be replaced by the low-rank layer: {reason}.")
        ours = describe(module)
        different = {k: (v, ours.get(k)) for k, v in dense.items() if ours.get(k) != v and k != "bias"}
        if different:
            text = ", ".join(f"{k} {saved!r} (the model: {own!r})" for k, (saved, own) in different.items())
            raise CheckpointError(f"{path}: {name!r} was saved with {text}; it is for another model.")
        try:
            built[name] = kind.like(module, rank=rank, bias=bias, **form)
        except (LowRankError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name!r}: {error}") from None
    return built


def _expected_state(model: nn.Module, built: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the model will have once ``built`` is in place."""
    aliases = {name: names for names in module_aliases(model).values() for name in names}
    places = {alias: new for name, new in built.items() for alias in aliases[name]}
    inside = tuple(f"{place}." for place in places)
    kept = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in kept.items() if not (inside and name.startswith(inside))}
    for place, new in places.items():
        state.update({f"{place}.{key}": tensor for key, tensor in new.state_dict(keep_vars=True).items()})
    return state


def _compare(state: dict[str, Tensor], tensors: dict[str, Tensor], path: object) -> None:
    missing = [name for name in state if name not in tensors]
    extra = [name for name in tensors if name not in state]
    problems = [f"missing {name!r}" for name in missing] + [f"unknown {name!r}" for name in extra]
    for name, tensor in tensors.items():
        if name in state:
            own = state[name]
            if own.shape != tensor.shape:
                problems.append(f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}")
            elif own.dtype != tensor.dtype:
                problems.append(f"{name!r} is {tensor.dtype}, the model is {own.dtype} (use model.to({tensor.dtype}))")
            elif isinstance(own, nn.Parameter) and not _may_be_stored(nn.Parameter(tensor, requires_grad=False)):
                problems.append(f"the parameter {name!r} has NaN or Inf entries")
    for names in tied_names(state).values():
        for other in names[1:]:
            first = names[0]
            if other in tensors and first in tensors and not torch.equal(tensors[first], tensors[other]):
                problems.append(f"{first!r} and {other!r} are one tensor in the model and differ in the file")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path}: does not fit the model: {'; '.join(problems[:5])}{more}. The model is unchanged."
        )
