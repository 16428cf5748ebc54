"""Files: atomic replacement, and safetensors files with a header of JSON that says what wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

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
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


def cache_folder() -> Path:
    """Returns the folder of what the library keeps for later runs on this machine, which may not exist yet.

    It is ``$XDG_CACHE_HOME/lowrank_layers``, or ``~/.cache/lowrank_layers``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lowrank_layers"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to, which replaces ``path`` on success and is removed on an error.

    Args:
        path: the file to write, new or existing.

    Examples:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "note.txt")
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> os.listdir(os.path.dirname(path))
        ['note.txt']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises if the folder of a file to write does not exist, before anything is computed for it.

    Args:
        path: the file.

    Raises:
        CheckpointError: for a folder, and a file in a folder that does not exist.
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> None:
    """Writes a safetensors file in place of ``path``.

    Args:
        path: the file.
        tensors: contiguous tensors of which no two share memory.
        key: name of the header in the file's metadata.
        header: what JSON can hold.

    Raises:
        CheckpointError: for a folder that does not exist.
    """
    check_writable(path)
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", key: json.dumps(header)})


def write_streamed(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> None:
    """Writes a safetensors file in place of ``path``, with no more than one tensor in memory.

    Args:
        path: the file.
        infos: shape and dtype of each tensor, by name.
        tensor_of: called once for each name, in the order of the file; tensors of one dtype keep their order.
        metadata: text by key, for the file's header.
        progress: yields the names it is given, and shows how far it is.
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
        for name in progress(names):
            tensor = tensor_of(name).detach().cpu().contiguous()
            if TensorInfo(tuple(tensor.shape), tensor.dtype) != infos[name]:
                raise CheckpointError(f"{path}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, not {infos[name]}.")
            tensor.flatten().view(torch.uint8).numpy().tofile(file)


def write_sharded(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    most: int,
) -> None:
    """Writes ``model.safetensors`` into a folder, or several files and the index of transformers, as it comes last.

    Args:
        folder: the folder.
        infos: shape and dtype of each tensor, by name.
        tensor_of: as in :func:`write_streamed`.
        metadata: text by key, for the header of every file.
        most: bytes of the tensors of one file, where a single one is not larger.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + info.nbytes > most:
            shards.append({})
        shards[-1][name] = info
    if len(shards) == 1:
        write_streamed(folder / "model.safetensors", infos, tensor_of, metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_streamed(folder / name, shard, tensor_of, metadata)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(info.nbytes for info in infos.values())}, "weight_map": places}
    with replacing(folder / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2))


def read_infos(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Reads the header of a safetensors file: its metadata, and the shape and dtype of each tensor.

    Args:
        path: the file.

    Raises:
        CheckpointError: for a file that is missing, torn or of unknown dtypes.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    odd = {dtype for _, dtype in found.values()} - DTYPES.keys()
    if odd:
        raise CheckpointError(f"{path}: has tensors of dtype {min(odd)!r}, expected one of {list(DTYPES)}.")
    return metadata, {name: TensorInfo(shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def read_header(path: Path, key: str, foreign: str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Reads all but the tensors of what :func:`write_tensors` wrote: its header, and shapes and dtypes.

    Args:
        path: the file.
        key: name of the header in the file's metadata.
        foreign: the message for a file without it, after the file's name.

    Raises:
        CheckpointError: for a file that is missing, torn or foreign.
    """
    metadata, infos = read_infos(path)
    return read_metadata(path, metadata, key, foreign), infos


def read_metadata(path: Path, metadata: Mapping[str, str], key: str, foreign: str) -> dict[str, Any]:
    """Reads the header of :func:`write_tensors` in the metadata of a safetensors file.

    Args:
        path: the file, for errors.
        metadata: its metadata.
        key: name of the header.
        foreign: the message for a file without it, after the file's name.

    Raises:
        CheckpointError: for a file that is foreign, or whose header is damaged.
    """
    if key not in metadata:
        raise CheckpointError(f"{path}: {foreign}")
    try:
        header = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its metadata is damaged: got {type(header).__name__}, expected a dict.")
    return header


def read_tensors(path: Path, key: str, foreign: str, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what :func:`write_tensors` wrote: the header and the tensors.

    Args:
        path: the file.
        key: name of the header in the file's metadata.
        foreign: the message for a file without it, after the file's name.
        device: where the tensors go.

    Raises:
        CheckpointError: for a file that is missing, torn or foreign.
    """
    header, infos = read_header(path, key, foreign)
    with _opened(path, device) as file:
        return header, {name: file.get_tensor(name) for name in infos}


def read_tensor(path: Path, name: str, device: str = "cpu") -> Tensor:
    """Reads one tensor of a safetensors file; on the CPU it is mapped from the file, and costs no memory of its own.

    Args:
        path: the file.
        name: the tensor.
        device: where it goes.

    Raises:
        CheckpointError: for a file that is missing or torn, or a tensor that is not in it.
    """
    with _opened(path, device) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no safetensors file: {error}") from None
