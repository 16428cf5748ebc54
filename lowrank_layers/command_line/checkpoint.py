"""Checkpoints of any size: names, shapes and dtypes at once, values one tensor at a time."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors files."""
_IN_FOLDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Args:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize


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
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {name!r} cannot be read: {error}") from None

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
        infos = {}
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    infos[name] = TensorInfo(tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except KeyError as error:
            raise CheckpointError(f"{path}: has tensors of dtype {error}, expected one of {list(DTYPES)}.") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: is torn or no safetensors file: {error}") from None
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
