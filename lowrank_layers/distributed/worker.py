"""One thread that takes jobs in order: collectives then go out in the same order in every process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.futures import Future

Job = Callable[[], Tensor]


class Worker:
    """Runs jobs one after another; the thread starts with the first job and ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Tensor]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._started = threading.Lock()

    def submit(self, job: Job, device: torch.device) -> Future[Tensor]:
        """What the job will return."""
        future: Future[Tensor] = Future(devices=[device] if device.type == "cuda" else None)
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="low-rank-gradients", daemon=True)
                self._thread.start()
        self._jobs.put((self._on_stream(job, device), future))
        return future

    def _on_stream(self, job: Job, device: torch.device) -> Job:
        """On a GPU: after what was launched so far, on a stream of its own."""
        if device.type != "cuda":
            return job
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        stream = self._stream(device)

        def run() -> Tensor:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                return job()

        return run

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        streams = self.__dict__.setdefault("_streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        stream: torch.cuda.Stream = streams[device]
        return stream

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)  # type: ignore[arg-type]
