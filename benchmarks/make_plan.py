"""Planning: CPU time and memory of make_plan over the depth of a model, beside another checkout of this library."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .common import arguments, machine, markdown_table, write_result

HERE = Path(__file__).resolve().parents[1]

WORKER = '''
import json, resource, sys, time
import torch
from torch import nn
import lowrank_layers as lr

depth, narrow, wide, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
generator = torch.Generator().manual_seed(0)
Moments = type(lr.calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.randn(4, 2)])["0"].inputs)


def moment(size):
    """Eigenvalues that decay as 1 / k, in random directions, and a few channels of large values."""
    rows = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, size + 1, dtype=torch.float64).rsqrt()
    channels = torch.ones(size, dtype=torch.float64)
    channels[:: max(1, size // 4)] = 10
    rows = channels[:, None] * rows * scale
    return rows @ rows.T / size


sizes = {narrow: [moment(narrow) for _ in range(4)], wide: [moment(wide) for _ in range(4)]}


def problem(depth):
    """Layers narrow -> wide and wide -> narrow in turn, as in an MLP of a transformer, with their statistics."""
    layers, stats = [], {}
    for k in range(depth):
        into, out = (narrow, wide) if k % 2 else (wide, narrow)
        layer = nn.Linear(into, out, bias=False)
        with torch.no_grad():
            layer.weight.normal_(generator=generator).mul_(torch.linspace(1, 0.1, into) / into**0.5)
        mean = torch.randn(into, generator=generator, dtype=torch.float64) / 10
        inputs = Moments(mean, sizes[into][k % 4] + torch.outer(mean, mean), 8192)
        gradients = sizes[out][k % 3] * float(torch.rand((), generator=generator) + 0.1)
        stats[str(k)] = lr.LayerStats(inputs, gradients, (256, into), positions=256.0)
        layers.append(layer)
    return nn.ModuleList(layers), lr.Statistics(stats, samples=32)


def plan(model, stats):
    return lr.make_plan(model, lr.Budget(params=0.5), stats=stats)


plan(*problem(2))  # imports and first calls do not count
model, stats = problem(depth)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
found = plan(model, stats)
seconds = time.process_time() - start
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": seconds, "MiB": grown / 1024, "ranks": [entry.rank for entry in found]}))
'''


def measured(checkout: Path, depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds, growth of the peak memory and ranks of one plan, made in a process of its own."""
    command = [sys.executable, "-c", WORKER, *map(str, (depth, args.narrow, args.wide, args.threads))]
    threads = str(args.threads)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def commit(checkout: Path) -> str:
    """Name of the commit that a folder holds."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return f"commit {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Median of one measurement over the runs."""
    return statistics.median(run[key] for run in runs)


def rows(depth: int, args: argparse.Namespace) -> list[list[object]]:
    """One row per checkout, measured in turn, each time another one first."""
    checkouts = {"ours": HERE, **({commit(args.against): args.against.resolve()} if args.against else {})}
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in checkouts}
    for k in range(args.rounds):
        for label in sorted(checkouts, reverse=bool(k % 2)):
            runs[label].append(measured(checkouts[label], depth, args))
    found = []
    for label, own in runs.items():
        seconds = median(own, "seconds")
        pairs = zip((run["seconds"] for run in own), (run["seconds"] for run in runs["ours"]), strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        same = own[0]["ranks"] == runs["ours"][0]["ranks"]
        cells = [f"{seconds:.2f}", f"{1e3 * seconds / depth:.0f}", f"{ratio:.2f}", f"{median(own, 'MiB'):.0f}"]
        found.append([depth, label, *cells, "yes" if same else "no"])
    return found


def run(args: argparse.Namespace) -> str:
    head = ["layers", "", "CPU seconds", "ms per layer", "ratio to ours", "growth of peak memory, MiB", "ranks as ours"]
    table = markdown_table(head, [row for depth in args.depths for row in rows(depth, args)])
    text = (
        f"A model of `nn.Linear` layers between {args.narrow} and {args.wide} channels at half its parameters, with"
        " second moments of inputs and gradients that decay as 1 / k. CPU seconds of the process, medians of"
        f" {args.rounds} rounds in turn, each plan in a process of its own."
    )
    return f"{text}\n\n{table}"


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--against", type=Path, help="git checkout of another commit of this library")
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 210], help="numbers of layers")
    parser.add_argument("--rounds", type=int, default=3, help="plans per checkout and depth")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    args = parser.parse_args()
    args.narrow, args.wide = (24, 40) if args.smoke else (576, 1536)
    if args.smoke:
        args.depths, args.rounds = [2, 4], 1
    text = f"# Planning\n\n{machine(args)}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'make_plan', text)}")


if __name__ == "__main__":
    main()
