"""Lost processes, and programs that end while a bucket is averaged."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lowrank_layers.distributed.worker_thread import WorkerThread
from tests.processes import run_processes

from .cases import batches, caught, made, train, wrap


def lost_process(rank: int) -> list[str]:
    """The errors of the first process when the second one leaves out a collective, and when it ends."""
    messages = []
    for trouble in ("absent", "gone"):
        wrapped, _ = wrap(made(), {"rank": 2, "timeout": timedelta(seconds=2)})
        train(wrapped, batches(rank, 3))
        dist.barrier()
        if rank == 0:
            result = caught(lambda rank: train(wrapped, batches(rank, 3, 3)), rank)  # noqa: B023
            messages.append(result and result["error"])
        elif trouble == "gone":
            os._exit(0)
        if trouble == "absent":
            dist.barrier()
    return messages


def test_a_lost_process_raises_in_the_others_within_the_timeout(tmp_path):
    """The hook has a timeout of 2 s. That of the processes is 45 s, and they would be killed before."""
    messages, gone = run_processes(lost_process, tmp_path, seconds=40, together=False)
    assert gone is None
    assert len(messages) == 2
    for message in messages:
        assert "averaging gradients failed" in message
        assert "start again from a checkpoint" in message


def thrown_away(rank: int) -> dict[str, bool]:
    """What is left of a state, its model and its thread when nobody holds them."""
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 3))
    kept = {"state": weakref.ref(state), "model": weakref.ref(wrapped.module)}
    del wrapped, state
    gc.collect()
    deadline = time.monotonic() + 20
    while (threads := _threads()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {name: left() is not None for name, left in kept.items()} | {"thread": bool(threads)}


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "low-rank-gradients"]


def test_a_state_that_is_thrown_away_leaves_nothing(tmp_path):
    assert run_processes(thrown_away, tmp_path) == [{"state": False, "model": False, "thread": False}] * 2


def test_after_a_failed_job_all_later_ones_fail_with_its_error():
    thread, ran = WorkerThread(), []
    futures = [thread.submit(job, torch.device("cpu")) for job in (lambda: 1 / 0, lambda: ran.append(1))]
    for future in futures:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            future.wait()
    assert not ran


PROGRAM = """
import time, torch
from lowrank_layers.distributed.worker_thread import WorkerThread
future = WorkerThread().submit(lambda: torch.ones(1), torch.device("cpu"))
still_running = future.then(lambda done: time.sleep(0.05))
future.wait()
"""


def test_a_program_that_ends_in_the_middle_of_a_job_ends_well():
    """Python stops its threads at the end; one that is just then in torch's C++ would abort the program."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
