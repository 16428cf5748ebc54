"""Forward passes of all batches side by side: each stage is run for every batch before the next one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import LowRankError
from .layer_recorder import LayerRecorder
from .loss_scale import LossScale
from .overridden import overridden
from .padding import Padding, in_backward
from .paused_run import PausedRun, in_resuming_thread, pause
from .run import Loss, forward, forward_with_gradients, output_loss
from .shared_inputs import SharedInputs
from .stage_call import StageCall
from .watched import count_macs, count_samples

LOSS = object()
"""The place of a pass that stands before its loss."""


@dataclass(eq=False)
class StagedPass:
    """The pass of one batch.

    Args:
        run: what pauses before each stage, and at ``LOSS``.
        scale: the scale of its loss.
        samples: how many samples the batch has.
        macs: MACs of layers that are counted only.
        counts: how often each stage was called.
        calls: the calls of stages that have yet to be run again, when there is a loss.
        copies: what they have kept of the inputs that are still there.
    """

    run: PausedRun
    scale: LossScale = field(default_factory=LossScale)
    samples: int = 0
    macs: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    calls: list[StageCall] = field(default_factory=list)
    copies: Any = field(default_factory=WeakTensorKeyDictionary)


class StagedForward:
    """Runs passes of a model that pause before each stage, as a context manager.

    Args:
        model: the model, in eval mode and frozen.
        stages: its stages, by name, and all layers; a call of one inside another one is a part of that.
        counted: layers whose MACs are counted.
        padding: what follows the masks of the model.
        shared: looks at the first pass.
        folder: where inputs of stages are kept in files.

    Attributes:
        recorders: who takes the inputs and gradients of a layer, by name of the layer; may change at any time.
        order: the stages that were called, in the order of their first calls, within stages too.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[str, nn.Module],
        counted: list[nn.Module],
        padding: Padding,
        shared: SharedInputs,
        folder: Path,
    ) -> None:
        self.recorders: Mapping[str, LayerRecorder] = {}
        self.order: dict[str, None] = {}
        self._model, self._stages, self._counted, self._padding = model, stages, counted, padding
        self._shared, self._folder = shared, folder
        self._first: StagedPass | None = None
        self._pass: StagedPass | None = None  # that runs now; one does at a time
        self._counts: Counter[str] | None = None  # of a pass that is run straight on
        self._inside = False
        self._undo = ExitStack()

    def __enter__(self) -> StagedForward:
        with ExitStack() as undo:
            undo.callback(self._model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            for module in self._counted:
                undo.callback(module.register_forward_hook(self._count_macs, with_kwargs=True).remove)
            for name, module in self._stages.items():
                undo.enter_context(overridden(module, partial(self._call, name, module, module.forward)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def start(self, batch: Any, loss: Loss | None) -> StagedPass:
        """Returns the pass of a batch, which stands before its first stage.

        Args:
            batch: the batch.
            loss: its loss.
        """

        def run() -> None:
            if loss is None:
                self._padding.start(batch)
                forward(self._model, batch, with_target=False)
                return
            output, target = forward_with_gradients(batch, self._padding)
            pause(LOSS)
            new.scale.backward(output_loss(output, target, loss, self._padding, "calibrate"), retain_graph=True)

        new = StagedPass(PausedRun(run, gradients=loss is not None))
        self._undo.callback(new.run.close)
        self._first = self._first or new
        self.resume(new)
        return new

    def resume(self, stopped: StagedPass) -> None:
        """Runs the stage before which a pass stands, and all up to the next one.

        Args:
            stopped: the pass.
        """
        self._pass = stopped
        try:
            stopped.run.resume()
        finally:
            self._pass = None

    def repeat(self, call: StageCall) -> None:
        """Runs a stage again and its gradients backwards.

        Args:
            call: its call.
        """
        self._inside = True
        try:
            call.repeat()
        finally:
            self._inside = False
        call.go_back()

    def count(self, batch: Any) -> Counter[str]:
        """Returns how often each stage is called in the pass of a batch, which is run straight on.

        Args:
            batch: the batch.
        """
        self._counts = counts = Counter[str]()
        try:
            forward(self._model, batch, with_target=False)
        finally:
            self._counts = None
        return counts

    def _start(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is not None:
            self._pass.samples += count_samples(self._padding, args, kwargs)

    def _count_macs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if self._pass is not None:
            self._pass.macs += count_macs(module, args, kwargs, self._padding)

    def _call(self, name: str, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a stage, or a layer inside one, does in the place of its own forward."""
        record = partial(self._record, name, module, own)
        if self._inside:
            return record(*args, **kwargs)
        if in_backward():
            raise LowRankError(
                f"calibrate: the stage {name!r} is run again by activation checkpointing around it; turn that off, or"
                " calibrate without folder=."
            )
        counts = self._counts if self._pass is None else self._pass.counts
        if counts is None:
            return own(*args, **kwargs)
        if self._pass is not None:
            pause(name)
        counts[name] += 1
        self._inside = True
        try:
            if self._pass is None or not self._pass.run.gradients:
                return record(*args, **kwargs)
            kept = self._pass.copies, self._folder
            call = StageCall(name, record, args, kwargs, self._padding, self._pass.scale, *kept)
            self._pass.calls.append(call)
            return call.run(args, kwargs)
        finally:
            self._inside = False
            self._shared.end_stage()

    def _record(self, name: str, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._pass is not None:
            self.order.setdefault(name)
        if self._is_first():
            self._shared.look(name, args, kwargs)
        if next(module.children(), None) is None:
            output = in_resuming_thread(partial(own, *args, **kwargs))
        else:
            output = own(*args, **kwargs)
        recorder = self.recorders.get(name)
        replaced = None if recorder is None else recorder.hook(module, args, kwargs, output)
        return output if replaced is None else replaced

    def _is_first(self) -> bool:
        """Whether this pass comes before any whose inputs are taken."""
        if self._pass is None:
            return self._counts is not None
        return self._pass is self._first and self._pass.run.gradients
