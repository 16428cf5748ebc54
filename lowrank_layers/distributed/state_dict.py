"""The state of gradients between processes, as plain tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LowRankError
from .error_feedback import Kept, Memory
from .matrices import matrix_shape


class Known(NamedTuple):
    """What a state goes on with.

    Args:
        step: the next one.
        ranks: by name, as a rule has found them.
        spent: bytes by name, of a budget.
        compress: what the link was found to want, if that was measured.
        memories: by name.
    """

    step: int
    ranks: dict[str, int]
    spent: dict[str, int]
    compress: bool | None
    memories: dict[str, Memory]


def saved(known: Known, process: int, processes: int) -> dict[str, Tensor]:
    """What is the same in all processes stands under its own name, the errors under the process'."""
    state = {"step": torch.tensor(known.step), "processes": torch.tensor(processes)}
    state |= {f"rank.{name}": torch.tensor(rank) for name, rank in known.ranks.items()}
    state |= {f"bytes.{name}": torch.tensor(spent) for name, spent in known.spent.items()}
    if known.compress is not None:
        state["compress"] = torch.tensor(known.compress)
    for name, memory in known.memories.items():
        state[f"right.{name}"] = memory.right.detach().clone()
        if memory.left is not None:
            state[f"left.{name}"] = memory.left.detach().clone()
        state[f"scale.{name}"] = torch.tensor(memory.scale, dtype=torch.float64)
        state[f"process{process}.error.{name}"] = memory.error.detach().clone()
    return state


def merge_comm_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state of those of all processes, for any number of new ones: every process then has the mean of the errors.

    Args:
        states: one :meth:`LowRankCommState.state_dict` a process (or one that holds all), of one step.

    Returns:
        What :meth:`LowRankCommState.load_state_dict` of any process takes.

    Raises:
        LowRankError: if a process is missing, or the states are not of one step.
    """
    if not states or any("step" not in state or "processes" not in state for state in states):
        raise LowRankError(f"merge_comm_states: got {len(states)} states, expected those of LowRankCommState.")
    if len({(int(state["step"]), int(state["processes"])) for state in states}) != 1:
        raise LowRankError("merge_comm_states: got states of different steps or runs, expected those of one step.")
    together = {key: tensor for state in states for key, tensor in state.items()}
    processes = range(int(together["processes"]))
    merged = {key: tensor for key, tensor in together.items() if not key.startswith("process")}
    for name in [key.removeprefix("right.") for key in together if key.startswith("right.")]:
        keys = [f"process{process}.error.{name}" for process in processes]
        missing = [key for key in keys if key not in together]
        if missing:
            raise LowRankError(f"merge_comm_states: {missing} are missing; give the states of all processes.")
        # gradients are averaged: what all processes owe together is the mean of their errors
        mean = torch.stack([together[key].float() for key in keys]).mean(0)
        merged[f"error.{name}"] = mean.to(together[keys[0]].dtype)
    return merged


def load(
    state: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    rank: int | None,
    kept: Kept,
    process: int,
    processes: int,
) -> Known:
    """Of one process, all of it checked first."""
    if "step" not in state:
        raise LowRankError("load_state_dict: got no 'step', expected what LowRankCommState.state_dict() returned.")
    own = f"process{process}.error."
    merged = "processes" not in state
    if not merged and int(state["processes"]) != processes:
        raise LowRankError(
            f"load_state_dict: got a state of {int(state['processes'])} processes, expected one of {processes}; "
            "merge the states of all old processes with lr.merge_comm_states."
        )
    names = [key.removeprefix("right.") for key in state if key.startswith("right.")]
    chosen, spent = (
        {key.removeprefix(kind): int(state[key]) for key in state if key.startswith(kind)}
        for kind in ("rank.", "bytes.")
    )
    wrong = [f"{name!r} is not in the model" for name in {**dict.fromkeys(names), **chosen} if name not in parameters]
    memories: dict[str, Memory] = {}
    for name in names:
        if name not in parameters:
            continue
        right, like = state[f"right.{name}"], parameters[name]
        error = state.get(f"error.{name}" if merged else own + name)
        shape = matrix_shape(like.shape)
        if error is None:
            wrong.append(f"{name!r} has no error of process {process}")
        elif shape is None or tuple(error.shape) != shape:
            wrong.append(f"{name!r} is {tuple(error.shape)} here and {shape} in the model")
        elif right.shape[-1] > min(shape[1:]):
            wrong.append(f"{name!r} has rank {right.shape[-1]} here and {min(shape[1:])} at most in the model")
        elif rank is not None and right.shape[-1] != min(rank, *shape[1:]):
            wrong.append(f"{name!r} has rank {right.shape[-1]} here and rank={rank} was given")
        elif tuple(right.shape) != (shape[0], shape[2], right.shape[-1]):
            wrong.append(f"{name!r} has directions {tuple(right.shape)}, expected {(shape[0], shape[2], '...')}")
        else:
            memories[name] = _memory(state, name, shape, error, like.device, kept)
    if wrong:
        raise LowRankError(f"load_state_dict: this state is of another model: {'; '.join(wrong)}. Nothing was loaded.")
    compress = bool(state["compress"]) if "compress" in state else None
    return Known(int(state["step"]), chosen, spent, compress, memories)


def _memory(
    state: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int, int],
    error: Tensor,
    device: torch.device,
    kept: Kept,
) -> Memory:
    right = state[f"right.{name}"]
    memory = Memory(shape, right.shape[-1], name, device, kept)
    memory.error = error
    memory.right.copy_(right)
    if memory.left is not None and f"left.{name}" in state:
        memory.left.copy_(state[f"left.{name}"])
    memory.scale = float(state[f"scale.{name}"])
    return memory
