"""One thread that runs jobs in order, so that collectives are called in the same order in every process."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from ..errors import LowRankError

Job = Callable[[], Tensor]
_Task = tuple[Job, Future[Any], torch.cuda.Stream | None]

GRACE = 5.0
"""Seconds that a program waits at its end for the running job, which may itself wait for a lost process."""


class WorkerThread:
    """Runs jobs one after another; the thread starts with the first job and ends with the program."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Lock()

    def submit(self, job: Job, device: torch.device) -> Future[Tensor]:
        """Queues a job and returns the future of its result; after a job has failed, all later ones fail.

        Args:
            job: a function without arguments that returns a tensor.
            device: device of that tensor; on CUDA the job runs in a stream of its own.
        """
        future: Future[Any] = Future(devices=[device] if device.type == "cuda" else None)
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="low-rank-gradients", daemon=True)
                self._thread.start()
                atexit.register(self._end)
        self._jobs.put((job, future, self._stream(device)))
        # an exception raised in a callback reaches DDP with its message, one that is set on the future does not
        return future.then(_tensor_of)

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream of jobs on a CUDA device, which waits for the kernels launched so far."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        stream.wait_event(ready)
        return stream

    @torch.no_grad()
    def _run(self) -> None:
        while (task := self._jobs.get()) is not None:
            job, future, stream = task
            # the result is set within the stream, so that whoever waits for the future waits for the stream too
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                future.set_result(self._result_of(job))

    def _end(self) -> None:
        """Ends the thread: Python would stop it anywhere, and in the middle of torch's C++ that aborts the program."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(GRACE)

    def _result_of(self, job: Job) -> Tensor | BaseException:
        if self._failure is None:
            try:
                return job()
            except BaseException as error:
                self._failure = error
        return self._failure


def _tensor_of(future: Future[Any]) -> Tensor:
    result = future.value()
    if isinstance(result, BaseException):
        raise LowRankError(
            f"low_rank_hook: averaging gradients failed in this process ({type(result).__name__}: {result}). If "
            "another is gone or later than timeout=, start again from a checkpoint of model, optimizer and this state."
        ) from result
    assert isinstance(result, Tensor)
    return result
