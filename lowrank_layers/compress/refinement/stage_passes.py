"""Forward passes of all batches that stop before each stage, which is then run from outside, as often as is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...calibrate import MaskOf, Padding, forward, main_output, target_of
from ...calibrate.overridden import overridden
from ...calibrate.paused_run import PausedRun, pause
from ...errors import LowRankError


@dataclass
class _Given:
    """What a stage returned.

    Args:
        output: all of it.
        main: the first tensor in it.
        rows: which rows of that are data.
        tensors: the tensors in it.
        tags: what is known of their padding.
    """

    output: Any
    main: Tensor | None
    rows: Tensor | None
    tensors: list[Tensor]
    tags: Any

    def main_rows(self) -> tuple[Tensor, Tensor | None]:
        """Returns the first tensor, and which rows of that are data.

        Raises:
            LowRankError: if there is none.
        """
        if self.main is None:
            raise LowRankError("refine_: a stage returned no tensor, expected one; name other stages.")
        return self.main, self.rows


class StagePass:
    """The pass of one batch.

    Args:
        passes: the model, and all that is done around its stages.
        batch: the batch.
    """

    def __init__(self, passes: StagePasses, batch: Any) -> None:
        self._passes = passes
        self._run = PausedRun(partial(passes._run, self, batch))
        self._given: _Given | None = None
        self._call: Callable[[], _Given] | None = None
        self._tensors: list[Tensor] = []

    def advance_to(self, stage: str) -> None:
        """Goes on to a stage, with what the one before it gives as it is now.

        Args:
            stage: the next one.

        Raises:
            LowRankError: if the pass comes to another one, or to none.
        """
        if self._call is not None and self._given is None:
            self.give()
        place = self._run.resume()
        if place != stage:
            where = "the end" if place is None else repr(place)
            raise LowRankError(
                f"refine_: a batch comes to {where}, expected the stage {stage!r}, which the first batch comes to; all"
                " batches have to take the same way through the model."
            )

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """Runs the stage before which the pass stands; returns its output, and which rows of that are data.

        Raises:
            LowRankError: for an output without a tensor, and for a stage that changes its input.
        """
        return self._computed().main_rows()

    @torch.no_grad()
    def give(self) -> _Given:
        """Runs the stage as it is now, for the pass to go on with its output, which is returned."""
        self._given = self._computed()
        return self._given

    def close(self) -> None:
        """Ends the pass where it is."""
        self._run.close()

    def _computed(self) -> _Given:
        assert self._call is not None
        versions = [tensor._version for tensor in self._tensors]
        found = self._call()
        if [tensor._version for tensor in self._tensors] != versions:
            raise LowRankError(
                "refine_: a stage changes its input in place, so that it cannot be run again; name larger stages."
            )
        return found


class StagePasses:
    """Passes of a model that stop before each of some stages, as a context manager.

    The code of the model between these runs in a thread of its own for each pass, and stages in that of the caller.

    Args:
        model: the model, in eval mode.
        stages: the stages, none inside another one.
        mask: how the padding of a batch is found.
    """

    def __init__(self, model: nn.Module, stages: Sequence[str], mask: MaskOf | None) -> None:
        self._model, self._stages = model, stages
        self._padding = Padding(model, mask)
        self._thread = threading.local()
        self._undo = ExitStack()

    def __enter__(self) -> StagePasses:
        with ExitStack() as undo:
            undo.enter_context(self._padding)
            for name in self._stages:
                module = self._model.get_submodule(name)
                undo.enter_context(overridden(module, partial(self._call, name, module.forward)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def start(self, batch: Any) -> StagePass:
        """Returns the pass of a batch, which has not begun.

        Args:
            batch: the batch.
        """
        new = StagePass(self, batch)
        self._undo.callback(new.close)
        return new

    def order(self, batch: Any) -> list[str]:
        """Returns the stages that one batch comes to, in the order of their calls.

        Args:
            batch: the batch.
        """
        found: list[str] = []
        with ExitStack() as hooks, torch.no_grad():
            for name in self._stages:
                module = self._model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: found.append(name)).remove)
            forward(self._model, batch, with_target=True)
        return found

    @torch.no_grad()
    def _run(self, new: StagePass, batch: Any) -> None:
        self._thread.running = new
        self._padding.start(batch, target_of(batch))
        forward(self._model, batch, with_target=True)

    def _call(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a stage does in the place of its own forward."""
        running: StagePass | None = getattr(self._thread, "running", None)
        if running is None:
            return own(*args, **kwargs)
        running._tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        snapshot = self._padding.snapshot(running._tensors)

        def call() -> _Given:
            with self._padding.resumed(snapshot, running._tensors):
                output = own(*args, **kwargs)
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                main = main_output(output)
                rows = None if main is None else self._padding.of_activation(main, tuple(main.shape[:-1]))
                return _Given(output, main, rows, tensors, self._padding.tags(tensors))

        running._call = call
        pause(name)
        given = running._given
        assert given is not None
        self._padding.tag(given.tensors, given.tags)
        running._call, running._given, running._tensors = None, None, []
        return given.output
