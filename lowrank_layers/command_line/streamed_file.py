"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import replacing
from .checkpoint import DTYPES, TensorInfo
from .display import track

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_writable(path: Path) -> None:
    """Raises if the folder of a file to write does not exist, before anything is computed for it.

    Args:
        path: the file.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: it is a folder, or its folder does not exist.")


def check_folder(path: Path) -> None:
    """Raises if a folder cannot be made, before anything is computed for it.

    Args:
        path: the folder, new or existing.
    """
    if not path.absolute().parent.is_dir() or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"{path}: cannot be a folder: it is a file, or its folder does not exist.")


def write_streamed(
    path: Path, infos: Mapping[str, TensorInfo], tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file in place of ``path``; the file appears when it is complete.

    Args:
        path: the file.
        infos: shape and dtype of each tensor, by name.
        tensor_of: called once for each name, in the order of the file; tensors of one dtype keep their order.
        metadata: text by key, for the file's header.
    """
    names = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        start, end = end, end + infos[name].nbytes
        kind = _NAMES[infos[name].dtype]
        header[name] = {"dtype": kind, "shape": list(infos[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in track(names, "writing"):
            tensor = tensor_of(name).detach().cpu().contiguous()
            if TensorInfo(tuple(tensor.shape), tensor.dtype) != infos[name]:
                raise CheckpointError(f"{path}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {infos[name]}.")
            tensor.flatten().view(torch.uint8).numpy().tofile(file)
