"""Saving and loading: plain safetensors files that describe themselves."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LowRankError
from ..files import read_metadata, read_tensors, write_tensors
from ..modules import (
    ModelDescription,
    check_can_be_filled,
    check_factors,
    check_model,
    fill_,
    module_aliases,
    replace_,
    separate,
    shared_names,
    tied_names,
)
from .tensor_files import Checkpoint

KEY = "lowrank_layers"
"""The entry of the file's metadata that holds the ranks."""
VERSION = 1
_HEADER = {"layers": dict, "unfused": list, "shared": dict}


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
    header = {"version": VERSION, **ModelDescription.of(model).to_json(), "shared": shared}
    write_tensors(path, tensors, KEY, header)


def load(path: str | os.PathLike[str], into: nn.Module) -> nn.Module:
    """Turns a freshly built dense model into the saved one, in place.

    Everything is read and compared first: names, kinds, ranks, shapes and dtypes. If anything does not fit, the
    error names it and the model is as it was. Parameters and buffers on the meta device are filled, and those that are
    one tensor in the model or were one in the saved model are one again.

    Args:
        path: the file that :func:`save` wrote, or the folder that :func:`compress_checkpoint` wrote. What
            ``save_pretrained`` of transformers wrote is read by its ``from_pretrained``.
        into: a model with the structure that the saved one had before it was factorized (or the factored one itself).

    Returns:
        The model ``into``.

    Raises:
        CheckpointError: if the file is torn, foreign, or for another model, or if the model has tensors on the meta
            device that no file holds, such as non-persistent buffers.
    """
    model = check_model(into)
    header, tensors = _read(Path(path))
    try:
        built = ModelDescription.from_json(header).build(model)
    except LowRankError as error:
        raise CheckpointError(f"{path}: {error}") from None
    state = _expected_state(model, built)
    for alias, name in header["shared"].items():
        if name not in tensors:
            raise CheckpointError(f"{path}: {alias!r} refers to {name!r}, which is not there; the file is damaged.")
        tensors[alias] = tensors[name]
    _compare(state, tensors, path)
    check_can_be_filled(model, state, path)
    replace_(model, built)
    fill_(model, tensors, header["shared"])
    complete: OrderedDict[str, Tensor] = OrderedDict(tensors)
    complete._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(complete, strict=True)
    return model


def _may_be_stored(tensor: Tensor) -> bool:
    """The one rule of saving and loading: parameters are finite, buffers may hold anything."""
    if not isinstance(tensor, nn.Parameter):
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    foreign = (
        f"was not written by lowrank_layers.save (no {KEY!r} in its metadata);"
        " load it with safetensors.torch.load_model, or with from_pretrained if transformers wrote it."
    )
    if path.is_dir() or path.name.endswith(".index.json"):
        files = Checkpoint(path)
        header = read_metadata(files.path, files.metadata, KEY, foreign)
        tensors = {name: files.read(name) for name in files}
    else:
        header, tensors = read_tensors(path, KEY, foreign)
    try:
        version = header["version"]
        damaged = [key for key, kind in _HEADER.items() if not isinstance(header[key], kind)]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {type(error).__name__}: {error}") from None
    if version != VERSION:
        raise CheckpointError(f"{path}: has format version {version!r}, expected {VERSION}; update the package.")
    if damaged:
        raise CheckpointError(f"{path}: its metadata is damaged in {', '.join(damaged)}.")
    return header, tensors


def _expected_state(model: nn.Module, built: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the model will have once ``built`` is in place."""
    aliases = module_aliases(model)
    places = {alias: new for name, new in built.items() for alias in aliases[model.get_submodule(name)]}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(parent in places for parent in _parents(name)):
            state[name] = tensor
    for place, new in places.items():
        state.update({f"{place}.{key}": tensor for key, tensor in new.state_dict(keep_vars=True).items()})
    return state


def _parents(name: str) -> Iterator[str]:
    """``a.b.c`` lies in ``a.b`` and in ``a``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


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
        hint = (
            " Sizes such as that of attention heads stand in the model's configuration: build the model from that of"
            " the saved one, or use save_pretrained and from_pretrained."
        )
        is_resized = any("has shape" in problem for problem in problems)
        raise CheckpointError(
            f"{path}: does not fit the model: {'; '.join(problems[:5])}{more}. The model is unchanged."
            f"{hint if is_resized else ''}"
        )
