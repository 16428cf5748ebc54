"""The folder of a run of ``compress_checkpoint``: what it was called with, and whether the disk has room for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CheckpointError
from ..files import check_folder, replacing
from .tensor_files import Checkpoint

WORK = ".lowrank_layers"
"""The folder, inside of the target, of what a run has done so far."""
_ARGUMENTS = "arguments.json"
"""The file in it of what the run was called with."""


def begin(target: Path, arguments: dict[str, Any], model: nn.Module, numbers: int) -> Path:
    """Makes the folder of a run, or finds that of one with the same arguments, and returns it.

    Args:
        target: where the result goes.
        arguments: what the run was called with, as JSON can hold it.
        model: the model.
        numbers: how many numbers the moments of its layers have.

    Raises:
        CheckpointError: if the target holds something else, or the disk has not enough space.
    """
    _check_space(target, model, numbers)
    check_folder(target)
    work, text = target / WORK, json.dumps(arguments, indent=1)
    known = work / _ARGUMENTS
    if work.is_dir() and not known.is_file() and list(target.iterdir()) == [work]:
        _remove(work)  # a run that was killed before it had begun
    if target.is_dir() and any(target.iterdir()):
        if not known.is_file():
            raise CheckpointError(
                f"{target}: is not empty, and holds no run of compress_checkpoint that goes on; give a new folder."
            )
        if known.read_text() != text:
            raise CheckpointError(
                f"{target}: holds a run with other weights, batches or settings; give a new folder, or remove it."
            )
        return work
    work.mkdir(parents=True)
    with replacing(known) as temporary:
        temporary.write_text(text)
    return work


def end(target: Path) -> None:
    """Removes the folder of a run whose result is written.

    What it was called with goes last: if it is killed here, the next call still knows the run, and does it again.

    Args:
        target: where the result is.
    """
    work = target / WORK
    for path in work.iterdir():
        if path.name != _ARGUMENTS:
            _remove(path)
    _remove(work)


def facts_of(checkpoint: Checkpoint) -> list[Any]:
    """Returns what tells one checkpoint from another, as JSON can hold it.

    Args:
        checkpoint: the checkpoint.
    """
    return [[name, list(info.shape), str(info.dtype)] for name, info in checkpoint.items()]


def digest_of(batches: Sequence[Any]) -> str:
    """Returns a hash of the tensors of all batches.

    Args:
        batches: the batches.
    """
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            found.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_space(target: Path, model: nn.Module, numbers: int) -> None:
    """Raises if the moments of the layers and the weights do not fit the disk."""
    needed = 8 * numbers + sum(parameter.nbytes for parameter in model.parameters())
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{target}: has {free / 2**30:.1f} GiB free, and moments and weights may take {needed / 2**30:.1f} GiB;"
            " free some, or skip layers."
        )
