"""Files: atomic replacement, and safetensors files with a header of JSON that says what wrote them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError


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
    if not path.parent.is_dir():
        raise CheckpointError(f"save: the folder {path.parent} does not exist.")
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt", key: json.dumps(header)})


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
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is torn or no safetensors file: {error}") from None
    if key not in metadata:
        raise CheckpointError(f"{path}: {foreign}")
    try:
        header = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its metadata is damaged: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its metadata is damaged: got {type(header).__name__}, expected a dict.")
    return header, tensors
