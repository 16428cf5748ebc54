"""Writing a safetensors file tensor by tensor behind a progress bar, and the checks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from .. import files
from ..files import TensorInfo
from .display import track


def write_streamed(
    path: Path, infos: Mapping[str, TensorInfo], tensor_of: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with :func:`lowrank_layers.files.write_streamed`, and shows a progress bar.

    Args:
        path: the file.
        infos: shape and dtype of each tensor, by name.
        tensor_of: called once for each name.
        metadata: text by key, for the file's header.
    """
    files.write_streamed(path, infos, tensor_of, metadata, progress=partial(track, description="writing"))
