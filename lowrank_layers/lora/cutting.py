"""Making adapters thinner: some directions stay, in the factors and in the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules import Succession
from .adapter import Adapter
from .weight_layout import WeightLayout


@torch.no_grad()
def thinned_(adapter: Adapter, layout: WeightLayout, index: Tensor) -> list[Succession]:
    """Keeps only some directions of an adapter, in place; the scaling stays.

    The parameters are new ones: autograd remembers the shape of a leaf for as long as a graph that used it lives.

    Args:
        adapter: the adapter, changed in place.
        layout: layout of its weight.
        index: indices of the directions that are kept, ascending.

    Returns:
        Which parameters take the place of which.
    """
    a, b = adapter.A, adapter.B
    index = index.to(a.device)

    def cut_a(tensor: Tensor) -> Tensor:
        return layout.joined(layout.directions(tensor, b)[0][index], b)[0].contiguous()

    def cut_b(tensor: Tensor) -> Tensor:
        return layout.joined(a, layout.directions(a, tensor)[1][index])[1].contiguous()

    adapter.A, adapter.B = _thinner(a, cut_a), _thinner(b, cut_b)
    if adapter.a0 is not None and adapter.b0 is not None:
        adapter.a0, adapter.b0 = cut_a(adapter.a0), cut_b(adapter.b0)
    return [
        Succession({"A": a}, {"A": adapter.A}, lambda state: [cut_a(tensor) for tensor in state]),
        Succession({"B": b}, {"B": adapter.B}, lambda state: [cut_b(tensor) for tensor in state]),
    ]


def removed(adapter: Adapter) -> list[Succession]:
    """The parameters of an adapter that is taken off: none take their place."""
    return [Succession({name: parameter}, {}) for name, parameter in adapter.named_parameters()]


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Raises if the optimizer has none of the parameters, or a state that cannot be cut with them."""
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


def _thinner(parameter: nn.Parameter, cut: Callable[[Tensor], Tensor]) -> nn.Parameter:
    thin = nn.Parameter(cut(parameter), parameter.requires_grad)
    thin.grad = None if parameter.grad is None else cut(parameter.grad)
    return thin
