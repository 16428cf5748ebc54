"""Forward passes of a model on one example, and the clock that times them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...calibrate import forward, quiet_eval
from ..recovery.objective import device_of


@dataclass(frozen=True)
class ExampleRun:
    """One batch, and how a model is run and timed on it.

    Args:
        batch: the batch.
        with_target: whether the last item of a tuple is a target.
        clock: a function that returns seconds; ``None`` is the processor time of this thread where it is the only one
            that computes, and wall-clock time otherwise. Other programs disturb the former less, but not never: with
            six of them per core, which empty its caches, ResNet-20 took 2.8 ms where it takes 1.7.
    """

    batch: Any
    with_target: bool
    clock: Callable[[], float] | None = field(default=None, repr=False)

    def call(self, model: nn.Module) -> None:
        """Runs the model once."""
        forward(model, self.batch, with_target=self.with_target)

    def clock_for(self, model: nn.Module) -> Callable[[], float]:
        """Returns the clock that times this model, which waits for its device."""
        if self.clock is not None:
            return self.clock
        if device_of(model).type == "cuda":
            return _after_cuda
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    @contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """Puts the model into eval mode and switches gradients off inside."""
        with quiet_eval(model), torch.no_grad():
            yield


def _after_cuda() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
