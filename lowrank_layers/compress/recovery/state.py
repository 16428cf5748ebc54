"""The state of a recovery in memory and on disk."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...files import replacing
from .data import Position
from .settings import RecoverySettings

FORMAT = "lowrank_layers.recovery"
VERSION = 1
FILE = "recovery.pt"


@dataclass
class Log:
    """What happened so far.

    Args:
        position: epoch, and number of batches of it that are done.
        losses: the objective of every step.
        scores: number of steps and held-out score.
        best_step: number of steps of the best state.
        best: the tensors of the best state; ``None`` where nothing is scored.
        stale: number of scores since the best one.
        finished: whether no step is left.
    """

    position: Position = (0, 0)
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best: dict[str, Tensor] | None = None
    stale: int = 0
    finished: bool = False

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    def add_score(self, score: float, state: Mapping[str, Tensor]) -> None:
        """Notes a score, and copies the state if it is the best one."""
        self.scores.append((self.step, score))
        self.stale += 1
        if self.best is None or score > dict(self.scores)[self.best_step or 0]:
            self.best = {name: tensor.detach().clone() for name, tensor in state.items()}
            self.best_step, self.stale = self.step, 0


def state_of(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what training changes: the trained parameters and all buffers."""
    return {**trained, **dict(model.named_buffers())}


@torch.no_grad()
def write_state_(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into the tensors of a model."""
    for name, tensor in state.items():
        tensor.copy_(values[name])


def save_state(
    folder: Path, settings: RecoverySettings, log: Log, state: Mapping[str, Tensor], others: Mapping[str, Any]
) -> None:
    """Writes a recovery's state in place of the one before, so that at any moment one of them is whole.

    Args:
        folder: the folder; it exists.
        settings: those of the recovery.
        log: what happened so far.
        state: the model's tensors.
        others: state dicts of the optimizer and the scaler of gradients, by name.
    """
    body = {"format": FORMAT, "version": VERSION, "settings": words_of(settings), "log": vars(log)}
    with replacing(folder / FILE) as temporary:
        torch.save({**body, "state": {name: tensor.detach() for name, tensor in state.items()}, **others}, temporary)


def load_state(folder: Path, settings: RecoverySettings, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Reads what :func:`save_state` wrote, on the CPU; ``None`` where nothing was written yet.

    Args:
        folder: the folder.
        settings: those of the recovery that goes on.
        state: the model's tensors, which must have the names and shapes of those in the file.

    Raises:
        CheckpointError: for a file that is torn or foreign, or of a recovery of another model or by other settings.
    """
    path = folder / FILE
    body = read_state(path, FORMAT, VERSION, "recover_", words_of(settings))
    if body is None:
        return None
    saved = {name: tuple(tensor.shape) for name, tensor in body["state"].items()}
    own = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(own.keys() | saved.keys()):
        if saved.get(name) != own.get(name):
            raise CheckpointError(
                f"{path}: {name!r} has shape {saved.get(name)}, and {own.get(name)} in the model: it is the state of"
                " another model, or other parameters are trained; choose another folder for resume=."
            )
    return body


def read_state(path: Path, form: str, version: int, writer: str, settings: Mapping[str, str]) -> dict[str, Any] | None:
    """Reads a file of torch's with a format, a version and settings; ``None`` where nothing was written yet.

    Args:
        path: the file. What killed processes have left beside it, half written, is removed.
        form: the expected format.
        version: the expected version.
        writer: the function that writes such files, for messages.
        settings: the settings that it has to be written with.

    Raises:
        CheckpointError: for a file that is torn or foreign, or was written with other settings.
    """
    for torn in path.parent.glob(f".{path.name}.*.tmp"):
        torn.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        body = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: is torn or no state of a recovery: {error}") from None
    if not isinstance(body, dict) or body.get("format") != form:
        raise CheckpointError(f"{path}: was not written by {writer}; choose another folder for resume=.")
    if body["version"] != version:
        raise CheckpointError(f"{path}: has version {body['version']!r}, expected {version}; update the package.")
    for name, value in settings.items():
        if body["settings"].get(name) != value:
            raise CheckpointError(
                f"{path}: was written with {name}={body['settings'].get(name)}, got {name}={value}; go on with the"
                " same settings, or choose another folder for resume=."
            )
    return body


def words_of(settings: RecoverySettings) -> dict[str, str]:
    """Returns the settings that decide the result, as words."""
    return {name: repr(value) for name, value in asdict(settings).items() if name != "save_every"}
