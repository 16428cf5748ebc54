"""Checkpoints of any size: names, shapes and dtypes at once, values one tensor at a time."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import DTYPES, TensorInfo, read_infos, read_tensor

_IN_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a file or folder, by name; :meth:`read` gives the values of one of them.

    Args:
        path: a ``.safetensors`` file, a file of tensors that ``torch.save`` wrote, an index of several files
            (``.index.json``), or a folder with one of these. Pickles of anything else are not opened.

    Raises:
        CheckpointError: if a file is missing or torn, or a pickle of more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        self._loaded: dict[Path, Mapping[str, Tensor]] = {}
        first = _first_file(path)
        if first.name.endswith(".index.json"):
            self._add_index(first)
        else:
            self._add(first)
        self._infos = {name: self._infos[name] for name in sorted(self._infos, key=_natural)}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str) -> Tensor:
        """Returns the values of one tensor, which are mapped from the file where the system can; not to be written to.

        Args:
            name: the tensor.
        """
        path = self._files[name]
        if path in self._loaded:
            return self._loaded[path][name]
        return read_tensor(path, name)

    def _add_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): index.parent / str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: is torn or no index of tensors: {error}") from None
        for file in dict.fromkeys(places.values()):
            self._add(file)
        missing = [name for name, file in places.items() if self._files.get(name) != file]
        if missing:
            raise CheckpointError(f"{index}: {missing[0]!r} is not in {places[missing[0]].name}; a file is damaged.")

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        infos = self._headers(path) if path.suffix == ".safetensors" else self._pickled(path)
        twice = infos.keys() & self._infos.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)!r} is in another file of the same index too.")
        self._infos |= infos
        self._files |= dict.fromkeys(infos, path)

    def _headers(self, path: Path) -> dict[str, TensorInfo]:
        metadata, infos = read_infos(path)
        self.metadata |= metadata
        return infos

    def _pickled(self, path: Path) -> dict[str, TensorInfo]:
        try:
            with warnings.catch_warnings():  # the error below says it in one line
                warnings.simplefilter("ignore")
                body: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception:  # torn pickles raise whatever their bytes lead to
            raise CheckpointError(
                f"{path}: is torn, or holds more than tensors and is not opened, since a pickle can run any code; write"
                " the state dict alone, best with safetensors.torch.save_file."
            ) from None
        for key in _WRAPPERS:
            if isinstance(body, Mapping) and isinstance(body.get(key), Mapping):
                body = body[key]
        if not isinstance(body, Mapping) or not all(isinstance(value, Tensor) for value in body.values()):
            raise CheckpointError(f"{path}: holds a {type(body).__name__}, expected a state dict: tensors by name.")
        odd = [name for name, value in body.items() if value.is_meta or value.layout is not torch.strided]
        odd += [name for name, value in body.items() if value.dtype not in DTYPES.values()]
        if odd:
            raise CheckpointError(f"{path}: {odd[0]!r} is no dense tensor of numbers, or has no values.")
        self._loaded[path] = body
        return {str(name): TensorInfo(tuple(value.shape), value.dtype) for name, value in body.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """The key that sorts ``layers.2`` before ``layers.10``: files of safetensors do not keep the order of the model."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _first_file(path: Path) -> Path:
    """The file to begin with: the path itself, or what a folder has."""
    if not path.is_dir():
        return path
    for name in _IN_FOLDER:
        if (path / name).is_file():
            return path / name
    found = [*path.glob("*.safetensors.index.json"), *path.glob("*.safetensors")]
    if len(found) != 1:
        names = ", ".join(sorted(each.name for each in found)) or "no weights"
        raise CheckpointError(f"{path}: has {names}, expected {_IN_FOLDER[1]} or one file of weights; give the file.")
    return found[0]
