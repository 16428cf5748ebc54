"""Seconds per step over slow links: low-rank gradients beside plain DDP and torch's own hooks.

Two processes in two network namespaces, joined by a veth pair whose rate `tc tbf` limits; needs Linux, root, iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr
from lowrank_layers.distributed.fallback import STEPS

from .common import arguments, machine, markdown_table, write_result

LINKS = {"100 Mbit": ("100mbit", "32kb"), "1 Gbit": ("1gbit", "128kb"), "unlimited": None}
"""Rate and burst; the burst is far below the bytes of a step at rank 4, so that it hides little."""
BARS = {"100 Mbit": 20.0, "1 Gbit": 2.3}
SLOWEST_FALLBACK = 1.05
ONE_BUCKET = 10_000
ALL_AGREED = 2 * STEPS + 2
"""Steps after which the fallback has decided."""

METHODS: dict[str, dict[str, Any]] = {
    "plain DDP": {},
    "torch fp16": {"torch": "fp16"},
    "torch PowerSGD r=1, one bucket": {"torch": 1, "cap": ONE_BUCKET},
    "ours r=1, one bucket": {"ours": {"rank": 1}, "cap": ONE_BUCKET},
    "ours r=1": {"ours": {"rank": 1}},
    "torch PowerSGD r=4, one bucket": {"torch": 4, "cap": ONE_BUCKET},
    "ours r=4, one bucket": {"ours": {"rank": 4}, "cap": ONE_BUCKET},
    "ours r=4": {"ours": {"rank": 4}},
    "ours r=4, alternate": {"ours": {"rank": 4, "alternate": True}},
    "ours r=4, fallback": {"ours": {"rank": 4, "fallback": True}},
}


def mlp(width: int) -> nn.Sequential:
    """An MLP of width 2,048 with 12.6 M parameters."""
    layers = [nn.Linear(width, width) for _ in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def wrapped(method: dict[str, Any], width: int) -> DistributedDataParallel:
    """A DDP model with the hook of one method."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(mlp(width), bucket_cap_mb=method.get("cap"))
    if "ours" in method:
        ddp.register_comm_hook(lr.LowRankCommState(model=ddp, **method["ours"]), lr.low_rank_hook)
    elif method.get("torch") == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif "torch" in method:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=method["torch"], start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return ddp


def step_of(ddp: DistributedDataParallel, args: argparse.Namespace) -> Callable[[], None]:
    """A function that trains one step on this process's own batch."""
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    x = torch.randn(args.batch, args.width, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()

    return step


def work(args: argparse.Namespace) -> None:
    """Runs one process: each method warms up, then they take turns; writes seconds and sent bytes per step."""
    torch.set_num_threads(1)
    url = f"tcp://{args.master}:29555"
    dist.init_process_group("gloo", init_method=url, rank=args.worker, world_size=2, timeout=timedelta(seconds=300))
    counter = Path(f"/sys/class/net/{os.environ['GLOO_SOCKET_IFNAME']}/statistics/tx_bytes")
    steps = {}
    for name, method in METHODS.items():
        steps[name] = step_of(wrapped(method, args.width), args)
        for _ in range(ALL_AGREED if "fallback" in name else 4):
            steps[name]()
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
    order = list(steps)
    for k in range(args.rounds):
        for name in order[k % len(order) :] + order[: k % len(order)]:
            dist.barrier()
            sent, start = int(counter.read_text()), time.perf_counter()
            steps[name]()
            taken[name].append((time.perf_counter() - start, int(counter.read_text()) - sent))
    args.result.write_text(json.dumps(taken))
    dist.barrier()
    dist.destroy_process_group()


def sh(*command: str, check: bool = True) -> None:
    subprocess.run(command, check=check, capture_output=True)


@contextlib.contextmanager
def two_namespaces(limit: tuple[str, str] | None) -> Iterator[list[str]]:
    """Creates two connected network namespaces, with an interface ``lr0`` at 10.77.0.1 and .2; gives their names."""
    names = [f"lowrank{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            sh("ip", "netns", "add", name)
            sh("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        sh("ip", "link", "add", "lr0", "netns", names[0], "type", "veth", "peer", "name", "lr0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            inside = ("ip", "netns", "exec", name)
            sh(*inside, "ip", "addr", "add", f"10.77.0.{number}/24", "dev", "lr0")
            sh(*inside, "ip", "link", "set", "lr0", "up")
            if limit is not None:
                rate, burst = limit
                tbf = ("root", "tbf", "rate", rate, "burst", burst, "latency", "400ms")
                sh(*inside, "tc", "qdisc", "add", "dev", "lr0", *tbf)
        yield names
    finally:
        for name in names:  # takes its end of the cable with it
            sh("ip", "netns", "del", name, check=False)


def measure(limit: tuple[str, str] | None, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds and sent bytes per step for each method, of the slower process at each step."""
    options = ("--rounds", str(args.rounds), "--width", str(args.width), "--batch", str(args.batch))
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lr0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, two_namespaces(limit) as names:
        results = [Path(folder) / str(rank) for rank in range(2)]
        command = (sys.executable, "-m", "benchmarks.link", "--master", "10.77.0.1", *options)
        workers = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "--worker", str(rank), "--result", str(results[rank])], env=env
            )
            for rank, name in enumerate(names)
        ]
        try:
            if any(worker.wait() for worker in workers):
                raise SystemExit("a worker failed")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        both = [json.loads(result.read_text()) for result in results]
    return {
        name: (
            statistics.median(max(a[0], b[0]) for a, b in zip(*(one[name] for one in both), strict=True)),
            statistics.median(a[1] for a in both[0][name]),
        )
        for name in METHODS
    }


def why_not() -> str | None:
    """The reason why the link cannot be created; empty if it can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing (iproute2)"
    try:
        with two_namespaces(LINKS["1 Gbit"]):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.decode().strip()}"


def judge(found: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    """The claims that are not met."""
    failed = []
    for link, rows in found.items():
        seconds = {name: row[0] for name, row in rows.items()}
        plain = seconds["plain DDP"]
        best = plain / min(seconds["ours r=1"], seconds["ours r=4"])
        if best < BARS.get(link, 0):
            failed.append(f"{link}: {best:.2f}x of plain DDP's speed, not {BARS[link]}")
        for rank in (1, 4):
            own = min(seconds[f"ours r={rank}"], seconds[f"ours r={rank}, one bucket"])
            theirs = seconds[f"torch PowerSGD r={rank}, one bucket"]
            failed += [] if own < theirs else [f"{link}: r={rank} takes {own:.3f} s, torch's hook {theirs:.3f} s"]
        slower = seconds["ours r=4, fallback"] / plain
        if link not in BARS and slower > SLOWEST_FALLBACK:
            failed.append(f"{link}: with fallback {slower:.2f} of plain DDP's time, not {SLOWEST_FALLBACK}")
    return failed


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per method")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="rows per process")
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--smoke", action="store_true", help="a small model on one link")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--master", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args)
    if args.smoke:
        args.rounds, args.width, args.links = 2, 128, ["1 Gbit"]
    line, reason = machine(args), why_not()
    if reason is not None:
        print(f"skipped: {reason}\nwritten to {write_result(args, 'link', f'# Slow links, skipped: {reason}')}")
        return None
    found = {link: measure(LINKS[link], args) for link in args.links}
    parameters = sum(p.numel() for p in mlp(args.width).parameters())
    text = (
        f"# Slow links\n\n{line} per process; 2 processes, gloo, an MLP of {parameters:,} parameters,"
        f" {args.batch} rows per process.\nMedian seconds per step of {args.rounds} (speed-up over plain DDP); bytes"
        " that one process put on the wire, by the interface's counter.\n\n"
    )
    rows = []
    for name in METHODS:
        cells = [f"{v[name][0]:.3f} ({v['plain DDP'][0] / v[name][0]:.2f})" for v in found.values()]
        rows.append((name, *cells, f"{next(iter(found.values()))[name][1]:,.0f}"))
    text += markdown_table(("", *found, "bytes per step"), rows) + "\n\n"
    failed = [] if args.smoke else judge(found)
    if not args.smoke:
        text += "All bars met." if not failed else "Not met: " + "; ".join(failed) + "."
    print(f"{text}\nwritten to {write_result(args, 'link', text)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
