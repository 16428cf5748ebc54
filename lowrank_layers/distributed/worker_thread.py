"""One thread that runs jobs in order, so that collectives are called in the same order in every process."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.futures import Future

from ..errors import LowRankError

Job = Callable[[], Tensor]
_Queue = queue.SimpleQueue[tuple[Job, Future[Any], torch.cuda.Stream | None] | None]

GRACE = 5.0
"""Seconds that a program waits at its end for the running job, which may itself wait for a lost process."""


_threads: WeakKeyDictionary[threading.Thread, _Queue] = WeakKeyDictionary()


class WorkerThread:
    """Runs jobs one after another; the thread starts with the first job and ends with this object or the program.

    Between jobs the thread holds nothing of what it has run, so that states, models and gradients can be freed.
    """

    def __init__(self) -> None:
        self._jobs: _Queue = queue.SimpleQueue()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
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
                self._thread = threading.Thread(target=_run, args=(self._jobs,), name="low-rank-gradients", daemon=True)
                self._thread.start()
                _threads[self._thread] = self._jobs
                weakref.finalize(self, self._jobs.put, None).atexit = False
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
def _run(jobs: _Queue) -> None:
    failure: BaseException | None = None
    while (task := jobs.get()) is not None:
        job, future, stream = task
        # the result is set within the stream, so that whoever waits for the future waits for the stream too
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            result: Tensor | BaseException | None = failure
            if failure is None:
                try:
                    result = job()
                except BaseException as error:
                    result = failure = error
            # the job is let go before others go on, so that they free its gradients and not this thread
            del task, job
            future.set_result(result)
        del future, result


@atexit.register
def _end() -> None:
    """Ends all threads: Python would stop them anywhere, and in the middle of torch's C++ that aborts the program."""
    for jobs in _threads.values():
        jobs.put(None)
    for thread in _threads:
        thread.join(GRACE)


def _tensor_of(future: Future[Any]) -> Tensor:
    result = future.value()
    if isinstance(result, BaseException):
        raise LowRankError(
            f"low_rank_hook: averaging gradients failed in this process ({type(result).__name__}: {result}). If "
            "another is gone or later than timeout=, start again from a checkpoint of model, optimizer and this state."
        ) from result
    assert isinstance(result, Tensor)
    return result
