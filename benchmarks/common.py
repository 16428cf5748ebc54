"""Command-line arguments, paired timing and result files that all benchmarks share."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from lowrank_layers.files import replacing

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, *, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with ``--device``, ``--threads`` and ``--out``; scripts add their own arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="device: cpu or cuda")
    parser.add_argument("--threads", type=int, default=threads, help="number of threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def machine(args: argparse.Namespace, *packages: str) -> str:
    """Describes hardware, threads and versions in one line, and sets the number of threads."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "lowrank-layers", *packages))
    return f"{hardware}, {args.threads} threads, {versions}, Python {platform.python_version()}"


def now(device: str) -> float:
    """Seconds of a clock, after all work of the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def paired_times(functions: Sequence[Callable[[], object]], *, rounds: int = 7, device: str = "cpu") -> list[float]:
    """Median seconds per function. The functions take turns (a b c a b c ...), after one warm-up round."""
    times: list[list[float]] = [[] for _ in functions]
    for k in range(rounds + 1):
        for function, taken in zip(functions, times, strict=True):
            start = now(device)
            function()
            if k:
                taken.append(now(device) - start)
    return [statistics.median(taken) for taken in times]


def paired(functions: Sequence[Callable[[], object]], rounds: int) -> tuple[list[float], list[float]]:
    """Median CPU seconds per function, and medians of their ratios to the first; they take turns to go first."""
    taken: list[list[float]] = [[] for _ in functions]
    for k in range(rounds + 1):
        for turn in range(len(functions)):
            which = (k + turn) % len(functions)
            start = time.process_time()
            functions[which]()
            if k:
                taken[which].append(time.process_time() - start)
    ratios = [statistics.median(t / base for t, base in zip(own, taken[0], strict=True)) for own in taken]
    return [statistics.median(own) for own in taken], ratios


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def write_result(args: argparse.Namespace, theme: str, text: str) -> Path:
    """Writes ``<theme>_<hardware>_<yyyymm>.md`` atomically."""
    args.out.mkdir(parents=True, exist_ok=True)
    hardware = "cpu" if args.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    path = args.out / f"{theme}_{hardware}_{datetime.date.today():%Y%m}.md"
    with replacing(path) as temporary:
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path
