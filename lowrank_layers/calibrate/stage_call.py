"""One call of a stage, cut out of the graph of gradients and run again when the gradients of its outputs are known."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import LowRankError
from ..memory import release_mapped, spilled
from .loss_scale import LossScale
from .padding import Padding
from .paused_run import thread_state

_SHOWN = 16
"""Entries of an output that are kept, to see that a stage returns the same when it is run again."""


class StageCall:
    """One call of a stage: :meth:`run` keeps its inputs and no graph, :meth:`repeat` finds their gradients.

    Between both, the operations after the stage have a graph of their own, that ends at the stage's outputs.

    Args:
        name: name of the stage.
        forward: what the stage computes.
        args: its positional arguments.
        kwargs: its keyword arguments.
        padding: the masks of the pass.
        scale: the scale of its loss.
        copies: copies of inputs that other calls of the pass have kept, by input, with its version.
        folder: where inputs are kept in files until the stage is run again.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        padding: Padding,
        scale: LossScale,
        copies: MutableMapping[Tensor, tuple[int, Tensor]],
        folder: Path,
    ) -> None:
        self.name = name
        self._forward, self._padding, self._scale = forward, padding, scale
        leaves, self._spec = tree_flatten((args, kwargs))
        self._traced = torch.is_grad_enabled()
        _check_visible(name, leaves, lambda tensor: tensor.requires_grad, "is given")
        self._places = {id(leaf): place for place, leaf in reversed(list(enumerate(leaves)))}
        self._snapshot = padding.snapshot(_tensors(leaves))
        self._context = thread_state(gradients=self._traced)
        self._edges: dict[int, GradientEdge] = {}
        self._kept: list[Any] = []
        self._versions: list[int] = []
        self._gradients: dict[int, Tensor] = {}
        self._given: dict[int, Tensor] = {}
        self._shown: dict[int, Tensor] = {}
        for leaf in leaves:
            kept = leaf
            if self._traced and isinstance(leaf, Tensor) and leaf.requires_grad:
                self._edges[self._places[id(leaf)]] = get_gradient_edge(leaf)
                if leaf not in copies or copies[leaf][0] != leaf._version:
                    copies[leaf] = leaf._version, spilled(leaf.detach(), folder)  # the model may change it in place
                kept = copies[leaf][1]
            self._kept.append(kept)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the stage's output, whose gradients come back here.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        leaves = _tensors(tree_flatten((args, kwargs))[0])
        versions = [tensor._version for tensor in leaves]
        with torch.no_grad():
            output = self._forward(*args, **kwargs)
        if [tensor._version for tensor in leaves] != versions:
            raise LowRankError(
                f"calibrate: the stage {self.name!r} changes its input in place, so that it cannot be run again; name"
                " larger stages, or calibrate without folder=."
            )
        self._versions = [tensor._version for tensor in _tensors(self._kept)]
        return self._cut(output) if self._traced else output

    def repeat(self) -> None:
        """Runs the stage again, and the gradients of its outputs backwards through it."""
        if [tensor._version for tensor in _tensors(self._kept)] != self._versions:
            raise LowRankError(
                f"calibrate: an argument of the stage {self.name!r} is changed in place after it, so that it cannot be"
                " run again; name other stages, or calibrate without folder=."
            )
        inputs = {place: self._kept[place].detach().requires_grad_() for place in self._edges}
        twins = {id(self._kept[place]): twin for place, twin in inputs.items()}
        leaves = [twins.get(id(leaf), leaf) for leaf in self._kept]
        args, kwargs = tree_unflatten(leaves, self._spec)
        with self._context(), self._padding.resumed(self._snapshot, _tensors(leaves)):
            outputs = tree_flatten(self._forward(*args, **kwargs))[0]
            self._check_same(outputs)
            reached = [place for place in self._gradients if outputs[place].requires_grad]
            if reached:
                torch.autograd.backward(
                    [outputs[place] for place in reached], [self._gradients[place] for place in reached]
                )
        release_mapped(_tensors(self._kept))
        self._given = {place: twin.grad for place, twin in inputs.items() if twin.grad is not None}

    def go_back(self) -> None:
        """Runs the gradients of its inputs backwards, through the operations before it to earlier stages."""
        if self._given:
            # other stages may be given what the same operations returned
            edges = [self._edges[place] for place in self._given]
            torch.autograd.backward(edges, list(self._given.values()), retain_graph=True)

    @property
    def has_gradients(self) -> bool:
        """Whether any gradient of an output has come back, which the inputs want to know."""
        return bool(self._gradients) and bool(self._edges)

    def take(self, place: int, gradient: Tensor) -> None:
        """Adds to the gradient of an output.

        Args:
            place: the place of the output.
            gradient: what one operation after it gives.
        """
        if not self._scale.is_measuring(gradient):
            before = self._gradients.get(place)
            self._gradients[place] = gradient if before is None else before + gradient

    def _cut(self, output: Any) -> Any:
        """The output, with new tensors in the place of those that the stage has computed."""
        values, spec = tree_flatten(output)
        _check_visible(self.name, values, _has_gradients, "returns")
        for place, value in enumerate(values):
            if isinstance(value, Tensor) and _has_gradients(value) and id(value) not in self._places:
                self._shown[place] = _some(value)
                self._scale.needed |= value.dtype == torch.float16
                # a copy: the stage may keep the tensor, or another one may show the same memory
                anchor = torch.zeros((), requires_grad=True)
                values[place] = _Cut.apply(anchor, self, place, [value.clone()])  # type: ignore[no-untyped-call]
                self._padding.tag([values[place]], self._padding.tags([value]))
        return tree_unflatten(values, spec)

    def _check_same(self, outputs: Sequence[Any]) -> None:
        for place, before in self._shown.items():
            now = _some(outputs[place]) if place < len(outputs) and isinstance(outputs[place], Tensor) else None
            most = float(before.abs().max()) if before.numel() else 0.0
            allowed = torch.finfo(before.dtype).eps ** 0.5 * most
            if now is None or not (
                now.shape == before.shape and torch.allclose(now, before, rtol=0.0, atol=allowed, equal_nan=True)
            ):
                raise LowRankError(
                    f"calibrate: the stage {self.name!r} returned something else when it was run again, as stages do"
                    " that draw random numbers or keep state, such as a cache; calibrate without folder=."
                )


class _Cut(torch.autograd.Function):
    """Gives a tensor to the operations after a stage, and the stage its gradient."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, call: StageCall, place: int, value: list[Tensor]) -> Tensor:
        ctx.call, ctx.place = call, place
        return value.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.call.take(ctx.place, gradient)
        return None, None, None, None


def _has_gradients(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _SHOWN)].clone()


def _check_visible(name: str, leaves: Sequence[Any], counts: Callable[[Tensor], bool], how: str) -> None:
    """Raises for tensors in objects whose parts are not known."""
    for leaf in leaves:
        if any(counts(tensor) for tensor in _inside(leaf, 3)):
            raise LowRankError(
                f"calibrate: the stage {name!r} {how} tensors in an object of type {type(leaf).__name__}, where their"
                " gradients cannot be followed; name other stages, or calibrate without folder=."
            )


def _inside(value: Any, depth: int) -> list[Tensor]:
    """The tensors that an object holds, a few levels deep; a tensor itself holds none."""
    if depth == 0 or isinstance(value, (Tensor, torch.nn.Module, type, str)):
        return []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    parts = [*parts, *getattr(value, "__dict__", {}).values()]
    found = [part for part in parts if isinstance(part, Tensor)]
    return found + [tensor for part in parts for tensor in _inside(part, depth - 1)]
