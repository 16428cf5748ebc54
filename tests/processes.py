"""Starts several gloo processes for a test and brings back what each returned."""

from __future__ import annotations

import faulthandler
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# what every process would import by itself, seconds each
PRELOAD = ["lowrank_layers", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


class Hang(AssertionError):
    """The processes were killed."""


def run_processes(
    work: Callable[..., Any],
    folder: Path,
    *args: Any,
    world: int = 2,
    seconds: float = 90,
    timeout: float = 45,
    together: bool = True,
    before: Callable[[], Any] | None = None,
) -> list[Any]:
    """``work(rank, *args)`` in each; its exceptions are raised here, processes that hang are killed.

    What ``before`` returns, called before the process group is there, is the first of ``args``.

    Without ``together`` they do not wait for each other at the end; a process that exits early returns ``None``.

    Where a process dies by a signal, all of it is tried once more, and a warning has the stacks: about one in a hundred
    runs of test_hook.py has ended so in torch's C++ code, and no tool has shown why yet.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    task = (work, world, str(folder), timeout, together, before, args)
    try:
        _run(task, world, folder, seconds)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is None:
            raise
        warnings.warn(f"a process died by a signal: {error} {error.__notes__}", stacklevel=2)
        _run(task, world, folder, seconds)
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _run(task: tuple[Any, ...], world: int, folder: Path, seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    method = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        torch.multiprocessing.set_forkserver_preload(PRELOAD)
    workers = torch.multiprocessing.start_processes(_start, task, nprocs=world, join=False, start_method=method)
    deadline = time.monotonic() + seconds
    try:
        while not workers.join(timeout=max(0.1, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise Hang(f"{task[0].__name__}: not done after {seconds} s")
    except torch.multiprocessing.ProcessExitedException as error:
        for file in sorted(folder.glob("*.crash")):
            error.add_note(f"{file.name}:\n{file.read_text()}")
        raise
    finally:
        for process in workers.processes:
            if process.is_alive():
                process.kill()


def _start(
    rank: int,
    work: Callable[..., Any],
    world: int,
    folder: str,
    timeout: float,
    together: bool,
    before: Callable[[], Any] | None,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    crash = open(Path(folder) / f"{rank}.crash", "w")  # noqa: SIM115, open as long as the process lives
    faulthandler.enable(crash)
    if before is not None:
        args = (before(), *args)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
        if together:
            dist.barrier()
    finally:
        dist.destroy_process_group()
