"""In which order the stages of all batches are run, and when their statistics are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..errors import LowRankError
from .stage_files import StageFile
from .staged_forward import LOSS, StagedForward, StagedPass

Finish = Callable[[str], object]
"""Called with the name of a stage after it was run for all batches, each time."""


def take_inputs(
    forward: StagedForward,
    passes: Sequence[StagedPass],
    files: Mapping[str, StageFile],
    calls: Counter[str],
    finish: Finish,
) -> None:
    """Runs all passes stage by stage, and takes the inputs of the layers meanwhile.

    Args:
        forward: what runs them.
        passes: the passes of all batches.
        files: the file of each stage.
        calls: how often each stage is called in a pass.
        finish: called with the name of a stage after it was run for all batches, each time.

    Raises:
        LowRankError: if a stage is called more often in a pass.
    """
    written = set()
    while waiting := [each for each in passes if not each.run.done]:
        place = str(waiting[0].run.paused_at)
        file = files[place]
        if file in written:
            raise LowRankError(
                f"calibrate: the stage {place!r} is called more often for some batches than for the first sample;"
                " calibrate without folder=."
            )
        for index, each in enumerate(passes):
            if each.run.paused_at == place:
                call = index, each.counts.total()
                forward.recorders = file.record(each.samples, each.scale, call, gradients=False)
                forward.resume(each)
        forward.recorders = {}
        if all(sum(each.counts[stage] - calls[stage] for stage in file.stages) >= 0 for each in passes):
            _write(file, passes)
            written.add(file)
        finish(place)
    for file in files.values():
        _write(file, passes)


def take_gradients(
    forward: StagedForward, passes: Sequence[StagedPass], files: Mapping[str, StageFile], finish: Finish
) -> None:
    """Runs all passes stage by stage, forward and back, and takes inputs and gradients of the layers on the way back.

    Args:
        forward: what runs them.
        passes: the passes of all batches.
        files: the file of each stage.
        finish: called with the name of a stage after it was run for all batches, each time.
    """
    _WithGradients(forward, passes, files, finish).run()


class _WithGradients:
    def __init__(
        self, forward: StagedForward, passes: Sequence[StagedPass], files: Mapping[str, StageFile], finish: Finish
    ) -> None:
        self._forward, self._passes, self._files, self._finish = forward, passes, files, finish
        self._losses = 0  # how many batches have had theirs

    def run(self) -> None:
        self._take_losses(None)
        while waiting := [each for each in self._passes if not each.run.done]:
            place = str(waiting[0].run.paused_at)
            for each in waiting:
                if each.run.paused_at == place:
                    self._forward.resume(each)
                    self._take_losses(place)
            self._finish(place)
        while True:
            for file in self._files.values():
                if file.is_open and not any(call.name in file.stages for each in self._passes for call in each.calls):
                    _write(file, self._passes)
            left = [each for each in self._passes if each.calls]
            if not left:
                return
            place = left[0].calls[-1].name
            for index in range(len(self._passes)):
                self._go_back(index, place)
            self._finish(place)

    def _take_losses(self, place: str | None) -> None:
        """Runs the losses that are next in the order of the batches, and goes back through the last stage at once.

        So that outputs as wide as a vocabulary are held for one batch.
        """
        while self._losses < len(self._passes) and self._passes[self._losses].run.paused_at is LOSS:
            self._forward.resume(self._passes[self._losses])
            self._go_back(self._losses, place)
            self._losses += 1

    def _go_back(self, index: int, place: str | None) -> None:
        """Runs the last calls of a batch again, those of one stage."""
        each = self._passes[index]
        while each.calls and each.calls[-1].name == place:
            call = each.calls.pop()
            file = self._files[call.name]
            if file.done and not call.has_gradients:
                continue
            at = index, len(each.calls)
            self._forward.recorders = file.record(each.samples, each.scale, at, gradients=True)
            self._forward.repeat(call)
            self._forward.recorders = {}


def _write(file: StageFile, passes: Sequence[StagedPass]) -> None:
    if file.is_open:
        file.write(sum(each.samples for each in passes))
