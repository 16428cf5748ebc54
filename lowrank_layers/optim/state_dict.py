"""The state dict of a projection: the wrapped optimizer's state and the projectors, by the original parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import LowRankError
from .projected_parameter import ProjectedParameter

_PROJECTOR_KEYS = ("projector", "projector_age", "projector_fits")


def merged_states(
    optimizer: Optimizer, parameters: Iterable[Tensor], projected: Mapping[Tensor, ProjectedParameter]
) -> dict[Tensor, dict[str, Any]]:
    """The wrapped optimizer's states, with the projectors, by the original parameters.

    Args:
        optimizer: the wrapped optimizer.
        parameters: the original parameters.
        projected: projected parameters by the original ones.
    """
    merged: dict[Tensor, dict[str, Any]] = {}
    for p in parameters:
        state = {**optimizer.state.get(_seen(p, projected), {})}
        if p in projected:
            state |= projected[p].state()
        if state:
            merged[p] = state
    return merged


def checked_states(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], projected: Mapping[Tensor, ProjectedParameter]
) -> dict[Tensor, dict[str, Any]]:
    """The states in a state dict by the original parameters.

    Args:
        state_dict: a state dict of a projection.
        groups: the projection's parameter groups.
        projected: projected parameters by the original ones.

    Raises:
        LowRankError: for groups of other lengths, or projectors of other shapes.
    """
    saved, own = ([len(group["params"]) for group in each] for each in (state_dict["param_groups"], groups))
    if saved != own:
        raise LowRankError(
            f"load_state_dict: got groups of {saved} parameters, expected {own}; build the optimizer as the saved one"
            " was."
        )
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    states = {p: dict(state_dict["state"].get(key, {})) for key, p in zip(keys, parameters, strict=True)}
    for p, state in states.items():
        got = tuple(state["projector"].shape) if "projector" in state else None
        expected = projected[p].expected_shape(got) if p in projected and state else None
        if got != expected:
            raise LowRankError(
                f"load_state_dict: got {_described(got)} for a parameter {list(p.shape)}, expected"
                f" {_described(expected)}; give the rank, target and min_size of the saved run."
            )
    return states


def load_wrapped(
    optimizer: Optimizer, states: Mapping[Tensor, dict[str, Any]], projected: Mapping[Tensor, ProjectedParameter]
) -> None:
    """Loads states, without the projectors, into the wrapped optimizer.

    Args:
        optimizer: the wrapped optimizer.
        states: states by the original parameters.
        projected: projected parameters by the original ones.
    """
    by_seen = {
        _seen(p, projected): {key: value for key, value in state.items() if key not in _PROJECTOR_KEYS}
        for p, state in states.items()
        if state
    }
    wrapped = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    wrapped["state"] = {index: by_seen[p] for index, p in enumerate(order) if p in by_seen}
    optimizer.load_state_dict(wrapped)


def _seen(p: Tensor, projected: Mapping[Tensor, ProjectedParameter]) -> Tensor:
    """The parameter that the wrapped optimizer has in place of this one."""
    return projected[p].small if p in projected else p


def _described(shape: tuple[int, ...] | None) -> str:
    return "no projector" if shape is None else f"a projector {list(shape)}"
