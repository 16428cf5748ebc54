"""The state of low-rank averaging as plain tensors by name: saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LowRankError
from .collectives import rank_and_world_size
from .error_feedback import GradientMemory
from .matricize import matricized_shape
from .settings import PowerSGDSettings


class Snapshot(NamedTuple):
    """What a run resumes from.

    Args:
        step: number of the next step.
        ranks: ranks by name that a rule or a budget has chosen.
        spent: bytes per step by name, under a budget.
        compress: what ``fallback`` has chosen; ``None`` before, and without it.
        memories: errors and directions by name.
    """

    step: int
    ranks: dict[str, int]
    spent: dict[str, int]
    compress: bool | None
    memories: dict[str, GradientMemory]


def to_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """The state dict of this process. Keys of errors name the process, all others are the same in every process."""
    process, processes = rank_and_world_size()
    state = {"step": torch.tensor(snapshot.step), "processes": torch.tensor(processes)}
    state |= {f"rank.{name}": torch.tensor(rank) for name, rank in snapshot.ranks.items()}
    state |= {f"bytes.{name}": torch.tensor(spent) for name, spent in snapshot.spent.items()}
    if snapshot.compress is not None:
        state["compress"] = torch.tensor(snapshot.compress)
    for name, memory in snapshot.memories.items():
        for kind, tensor in memory.tensors().items():
            state[f"process{process}.error.{name}" if kind == "error" else f"{kind}.{name}"] = tensor
    return state


def from_tensors(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], settings: PowerSGDSettings) -> Snapshot:
    """The snapshot in a state dict.

    Args:
        state: a state dict of this process, or one of :func:`merge_comm_states`.
        parameters: parameters by name.
        settings: the settings, whose rank has to fit.

    Raises:
        LowRankError: for a state of another model, rank or number of processes.
    """
    process, processes = rank_and_world_size()
    if "step" not in state:
        raise LowRankError("load_state_dict: got no 'step', expected what LowRankCommState.state_dict() returned.")
    merged = "processes" not in state
    if not merged and int(state["processes"]) != processes:
        raise LowRankError(
            f"load_state_dict: got a state of {int(state['processes'])} processes, expected one of {processes}; "
            "merge the states of all old processes with lr.merge_comm_states."
        )
    ranks, spent = (
        {key.removeprefix(kind): int(state[key]) for key in state if key.startswith(kind)}
        for kind in ("rank.", "bytes.")
    )
    names = _names(state)
    wrong = [f"{name!r} is not in the model" for name in {**dict.fromkeys(names), **ranks} if name not in parameters]
    memories: dict[str, GradientMemory] = {}
    for name in names:
        if name not in parameters:
            continue
        keys = {kind: f"{kind}.{name}" for kind in ("right", "left", "scale", "error")}
        if not merged:
            keys["error"] = f"process{process}.error.{name}"
        tensors = {kind: state[key] for kind, key in keys.items() if key in state}
        if "error" not in tensors:
            wrong.append(f"{name!r} has no error of process {process}")
        elif (mismatch := _mismatch(tensors, parameters[name], settings)) is not None:
            wrong.append(f"{name!r} {mismatch}")
        else:
            rank = tensors["right"].shape[-1]
            memories[name] = GradientMemory(name, parameters[name], rank, settings)
            memories[name].load(tensors)
    if wrong:
        raise LowRankError(f"load_state_dict: this state is of another model: {'; '.join(wrong)}. Nothing was loaded.")
    compress = bool(state["compress"]) if "compress" in state else None
    return Snapshot(int(state["step"]), ranks, spent, compress, memories)


def merge_comm_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merges the states of all processes into one, for a run with any number of processes.

    Every process that loads it gets the mean of the errors.

    Args:
        states: :meth:`LowRankCommState.state_dict` of each process at the same step, or one that holds the errors of
            all of them.

    Returns:
        A state for :meth:`LowRankCommState.load_state_dict` in every process.

    Raises:
        LowRankError: if a process is missing, or the states are of different steps.
    """
    if not states or any("step" not in state or "processes" not in state for state in states):
        raise LowRankError(f"merge_comm_states: got {len(states)} states, expected those of LowRankCommState.")
    if len({(int(state["step"]), int(state["processes"])) for state in states}) != 1:
        raise LowRankError("merge_comm_states: got states of different steps or runs, expected those of one step.")
    together = {key: tensor for state in states for key, tensor in state.items()}
    processes = range(int(together["processes"]))
    merged = {key: tensor for key, tensor in together.items() if not key.startswith("process")}
    for name in _names(together):
        keys = [f"process{process}.error.{name}" for process in processes]
        missing = [key for key in keys if key not in together]
        if missing:
            raise LowRankError(f"merge_comm_states: {missing} are missing; give the states of all processes.")
        # gradients are averaged, so what is missing in them is the mean of the errors
        mean = torch.stack([together[key].float() for key in keys]).mean(0)
        merged[f"error.{name}"] = mean.to(together[keys[0]].dtype)
    return merged


def _names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the gradients that have a memory."""
    return [key.removeprefix("right.") for key in state if key.startswith("right.")]


def _mismatch(tensors: Mapping[str, Tensor], parameter: Tensor, settings: PowerSGDSettings) -> str | None:
    """Why a memory cannot be that of a parameter; ``None`` if it can."""
    right, error, shape = tensors["right"], tensors["error"], matricized_shape(parameter.shape)
    if shape is None or tuple(error.shape) != shape:
        return f"is {tuple(error.shape)} here and {shape} in the model"
    if right.shape[-1] > min(shape[1:]):
        return f"has rank {right.shape[-1]} here and {min(shape[1:])} at most in the model"
    if isinstance(settings.rank, int) and right.shape[-1] != min(settings.rank, *shape[1:]):
        return f"has rank {right.shape[-1]} here and rank={settings.rank} was given"
    if tuple(right.shape) != (shape[0], shape[2], right.shape[-1]):
        return f"has directions {tuple(right.shape)}, expected {(shape[0], shape[2], '...')}"
    return None
