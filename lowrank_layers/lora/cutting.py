"""Making adapters thinner: the directions of an index stay, in the factors and in the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .adapter import Adapter
from .weight_layout import Kind


class Swap(NamedTuple):
    """A parameter, the one in its place (``None``: it is gone), and what cuts a tensor of the old shape likewise."""

    old: nn.Parameter
    new: nn.Parameter | None
    cut: Callable[[Tensor], Tensor]


@torch.no_grad()
def cut_(adapter: Adapter, kind: Kind, index: Tensor) -> list[Swap]:
    """Leaves the directions of that index, in place; the scaling stays.

    The parameters are new ones: autograd remembers the shape of a leaf for as long as a graph that used it lives.

    Args:
        adapter: changed in place.
        kind: its layout.
        index: of the directions, ascending.
    """
    a, b = adapter.A, adapter.B
    index = index.to(a.device)

    def cut_a(tensor: Tensor) -> Tensor:
        return kind.joined(kind.directions(tensor, b)[0][index], b)[0].contiguous()

    def cut_b(tensor: Tensor) -> Tensor:
        return kind.joined(a, kind.directions(a, tensor)[1][index])[1].contiguous()

    adapter.A, adapter.B = _thinner(a, cut_a), _thinner(b, cut_b)
    if adapter.a0 is not None and adapter.b0 is not None:
        adapter.a0, adapter.b0 = cut_a(adapter.a0), cut_b(adapter.b0)
    return [Swap(a, adapter.A, cut_a), Swap(b, adapter.B, cut_b)]


def gone(adapter: Adapter) -> list[Swap]:
    """The parameters of an adapter that is taken off."""
    return [Swap(parameter, None, torch.clone) for parameter in adapter.parameters()]


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuses an optimizer that has nothing to do with the parameters, or a state that cannot be cut."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [p for p in parameters if id(p) in known]
    if not found:
        raise LowRankError("finish: the optimizer has none of the adapter's parameters; give the one that trains them.")
    for p in found:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.shape != p.shape and value.numel() != 1:
                raise LowRankError(
                    f"finish: {type(optimizer).__name__} has the state {key!r} of shape {tuple(value.shape)} for a"
                    f" parameter of shape {tuple(p.shape)}, expected equal shapes; call finish() without the optimizer"
                    " and make a new one."
                )


def swap_(optimizer: torch.optim.Optimizer, swaps: Iterable[Swap]) -> None:
    """Puts the new parameters where the old ones were, with their state cut likewise."""
    by_id = {id(swap.old): swap for swap in swaps}
    for group in optimizer.param_groups:
        now = [by_id[id(p)].new if id(p) in by_id else p for p in group["params"]]
        group["params"] = [p for p in now if p is not None]
        if "param_names" in group:
            names = zip(group["param_names"], now, strict=True)
            group["param_names"] = [name for name, p in names if p is not None]
    for swap in by_id.values():
        state: dict[str, Any] | None = optimizer.state.pop(swap.old, None)
        if swap.new is not None and state:
            optimizer.state[swap.new] = {
                key: swap.cut(value) if isinstance(value, Tensor) and value.shape == swap.old.shape else value
                for key, value in state.items()
            }


def _thinner(parameter: nn.Parameter, cut: Callable[[Tensor], Tensor]) -> nn.Parameter:
    thin = nn.Parameter(cut(parameter), parameter.requires_grad)
    thin.grad = None if parameter.grad is None else cut(parameter.grad)
    return thin
