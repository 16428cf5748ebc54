"""Forward passes of the dense model and of its compressed prefix, side by side with the compression.

The passes of all batches pause before each layer until it is decided what becomes of it, so that no layer is run twice,
and time is linear in depth. Where that cannot be, passes start from anew for each layer: because it is called several
times per pass, or in another order than for the first batch; because the activations of all batches would take too much
memory; or because the model keeps something of a pass in itself, where another pass would find it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibrate import DataRows, MaskOf, Padding, as_batch, forward, layer_input, target_of
from ..calibrate.overridden import overridden
from ..calibrate.paused_run import PausedRun, in_resuming_thread, pause
from ..memory import release_mapped, spilled

HELD = 4 << 30
"""Bytes of activations that paused passes may hold, by a rough estimate: six times the largest input of a layer."""
THREADS = 4096
"""Threads that paused passes may have: OpenMP gives each one that computes a pool of its own."""

Kind = Literal["dense", "compressed", "disturbed"]
Input = tuple[Tensor, DataRows | None]
"""A layer's input with a batch dimension, and which of its rows are data."""


class _Reached(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass(eq=False)
class _Pass:
    """One forward pass of one batch.

    Args:
        kind: in the dense model, with the compressed layers, or with all outputs of layers halved.
        wanted: the layer whose inputs are collected; ``None`` for a pass that pauses.
        calls: after how many calls of it the pass ends.
        seen: these inputs; of a pass that pauses, that of the layer before which it stands.
        last: the input of the layer before which it stands, its version, and the layers that were given it.
    """

    kind: Kind
    wanted: str | None = None
    calls: int = 0
    seen: list[Input] = field(default_factory=list)
    last: tuple[weakref.ref[Tensor], int, list[str]] | None = None


class SideBySide:
    """Gives the inputs of one layer after the other, in the dense model and behind the compressed prefix.

    A context manager, inside which the layers of the model ask here what to compute.

    Args:
        model: the dense model, in eval mode.
        names: the layers.
        batches: what is run.
        with_target: whether the last item of a tuple batch is the target.
        mask: how the padding of a batch is found.
        example: a small batch, to try with whether passes can pause; ``None`` takes the first one.
        folder: where large inputs wait while that is tried; ``None`` keeps them in memory.

    Attributes:
        calls: how often each layer is called for the first batch, in the order of their first calls.
        decided: what the compressed prefix calls in the place of a layer, ``None`` for the layer itself; to be filled
            in the order of ``calls``.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Any],
        with_target: bool,
        mask: MaskOf | None,
        example: Any,
        folder: Path | None = None,
    ) -> None:
        self.calls: dict[str, int] = {}
        self.decided: dict[str, nn.Module | None] = {}
        self._model, self._batches, self._with_target = model, batches, with_target
        self._example = batches[0] if example is None else example
        self._folder = folder
        self._layers = {name: model.get_submodule(name) for name in names}
        self._own = {name: vars(layer).get("forward") for name, layer in self._layers.items()}
        self._padding = Padding(model, mask)
        self._thread = threading.local()
        self._paused: list[dict[Kind, tuple[PausedRun, _Pass]]] = []
        self._undo = ExitStack()

    def __enter__(self) -> SideBySide:
        with ExitStack() as undo:
            undo.enter_context(self._padding)
            for name, layer in self._layers.items():
                undo.enter_context(overridden(layer, self._forward(name, layer)))
            undo.callback(self._close)
            for _ in range(self._pausable()):
                batch = self._batches[len(self._paused)]
                self._paused.append({kind: self._pausing(batch, kind) for kind in ("dense", "compressed")})
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def inputs(self, name: str, index: int, kind: Kind) -> list[Input]:
        """Returns the inputs of a layer for one batch, call by call.

        Args:
            name: the first layer that is not decided.
            index: the index of the batch.
            kind: in the dense model, or behind the compressed prefix.
        """
        if self.calls[name] == 1 and index < len(self._paused):
            run, paused = self._paused[index][kind]
            while not run.done and (run.paused_at is None or run.paused_at in self.decided):
                run.resume()
            if run.done:
                return []
            if run.paused_at == name:
                return paused.seen
        found = _Pass(kind, name, self.calls[name])
        with suppress(_Reached):
            self._run(self._batches[index], found)
        return found.seen

    @contextmanager
    def own_forward(self, name: str) -> Iterator[None]:
        """Lets one layer compute what it does by itself, inside.

        Args:
            name: the layer.
        """
        with overridden(self._model.get_submodule(name), self._own.get(name)):
            yield

    def have_same_inputs(self, name: str, other: str) -> bool:
        """Whether a layer is given the very tensors that another one was given, in all passes.

        Args:
            name: the first layer that is not decided.
            other: one before it.
        """
        return len(self._paused) == len(self._batches) and all(
            self.inputs(name, index, kind) and run.paused_at == name and paused.last and other in paused.last[2]
            for index, passes in enumerate(self._paused)
            for kind, (run, paused) in passes.items()
        )

    def _pausable(self) -> int:
        """How many batches have passes that pause; finds the calls of all layers on the way."""
        straight: list[tuple[str, Tensor]] = []
        largest = 0

        def look(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = layer_input(args, kwargs)
                straight.append((name, x.clone() if self._folder is None else spilled(x, self._folder)))

            return hook

        def count(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal largest
                largest = max(largest, layer_input(args, kwargs).nbytes)
                self.calls[name] = self.calls.get(name, 0) + 1

            return hook

        for batch, what in ((self._example, look), (self._batches[0], count)):
            with ExitStack() as hooks, torch.no_grad():
                for name, layer in self._layers.items():
                    hooks.callback(layer.register_forward_pre_hook(what(name), with_kwargs=True).remove)
                forward(self._model, batch, with_target=self._with_target)
        if not self._keeps_nothing(straight):
            return 0
        workers = max(1, torch.get_num_threads() - 1)
        return min(len(self._batches), THREADS // (2 * workers), HELD // (6 * max(1, largest)))

    def _keeps_nothing(self, straight: list[tuple[str, Tensor]]) -> bool:
        """Whether a pass by turns with one of other values is the same as one that runs straight on.

        Args:
            straight: the layers and their inputs in the second one; they are taken out of it, and let go of.
        """
        own, other = (self._pausing(self._example, kind) for kind in ("dense", "disturbed"))
        left = straight[::-1]
        straight.clear()
        try:
            while (name := own[0].resume()) is not None:
                expected, y = left.pop() if left else (None, own[1].seen[0][0])
                if name != expected or not _are_close(own[1].seen[0][0], y):
                    return False
                other[0].resume()
        finally:
            own[0].close()
            other[0].close()
        return not left

    def _pausing(self, batch: Any, kind: Kind) -> tuple[PausedRun, _Pass]:
        new = _Pass(kind)
        return PausedRun(lambda: self._run(batch, new)), new

    @torch.no_grad()
    def _run(self, batch: Any, new: _Pass) -> None:
        self._thread.running = new
        try:
            self._padding.start(batch, target_of(batch) if self._with_target else None)
            forward(self._model, batch, with_target=self._with_target)
        finally:
            self._thread.running = None

    def _forward(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        """What a layer does inside: looks whether to stop, and computes what was decided."""
        own, leaf = layer.forward, next(layer.children(), None) is None

        def ahead(*args: Any, **kwargs: Any) -> Any:
            running: _Pass | None = getattr(self._thread, "running", None)
            if running is None:
                output = own(*args, **kwargs)
                release_mapped(layer.parameters())
                return output
            if running.wanted == name:
                running.seen.append(self._input(layer, args, kwargs))
                if len(running.seen) == running.calls:
                    raise _Reached
            elif running.wanted is None and name in self.calls and name not in self.decided:
                running.seen = [self._input(layer, args, kwargs)]
                x = running.seen[0][0]
                if running.last is None or running.last[0]() is not x or running.last[1] != x._version:
                    running.last = weakref.ref(x), x._version, []
                running.last[2].append(name)
                del x
                pause(name)
                running.seen = []
            replacement = self.decided.get(name) if running.kind == "compressed" else None
            if replacement is not None:
                output = in_resuming_thread(partial(replacement, *args, **kwargs))
            elif leaf:
                output = in_resuming_thread(partial(own, *args, **kwargs))
            else:
                output = own(*args, **kwargs)
            release_mapped((layer if replacement is None else replacement).parameters())
            return output / 2 if running.kind == "disturbed" else output

        return ahead

    def _input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Input:
        x = layer_input(args, kwargs)
        batched = as_batch(layer, x)
        return batched, self._padding.of(layer, x, batched)

    def _close(self) -> None:
        for passes in self._paused:
            for run, _ in passes.values():
                run.close()


def _are_close(x: Tensor, y: Tensor) -> bool:
    bound = 1e-3 * float(y.abs().max())
    return torch.allclose(x.view_as(y).double(), y.double(), rtol=0, atol=bound, equal_nan=True)
