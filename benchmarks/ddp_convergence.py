"""Loss and accuracy with low-rank gradients, beside plain DDP and torch's PowerSGD hook: a small task, then ResNet-20.

In the small task an MLP learns the outputs of a fixed random network from new batches. Both parts run in 2 processes,
and every row has the same steps, seeds and data. ResNet-20 is trained by `examples/ddp_cifar.py`.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, write_result
from .data import available

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ddp_cifar.py"
START = 2
"""Steps with uncompressed gradients at the start: the fewest that torch's hook accepts."""
SMALL: dict[str, dict[str, Any]] = {"plain DDP": {}}
for _rank in (1, 4):
    SMALL |= {
        f"torch r={_rank}": {"torch": _rank},
        f"ours r={_rank}": {"ours": {"rank": _rank}},
        f"ours r={_rank}, from step 0": {"ours": {"rank": _rank, "start_step": 0}},
        f"ours r={_rank}, alternate": {"ours": {"rank": _rank, "alternate": True}},
    }
SMALL |= {
    "torch r=4, no error feedback": {"torch": 4, "feedback": False},
    "ours r=4, no error feedback": {"ours": {"rank": 4, "error_feedback": False}},
    "torch r=1, no warm start": {"torch": 1, "warm": False},
    "ours r=1, no warm start": {"ours": {"rank": 1, "warm_start": False}},
}
CIFAR: dict[str, tuple[str, ...]] = {
    "plain DDP": ("--hook", "none"),
    "r=4, int8": ("--rank", "4", "--wire", "int8"),
    "r=4": ("--rank", "4"),
    "r=2, alternate, bf16": ("--rank", "2", "--alternate", "--wire", "bfloat16"),
    "torch r=4": ("--hook", "powersgd", "--rank", "4"),
}
POINTS, RATIO = 0.5, 50


def teacher_batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs, and the outputs of a fixed random network for them."""
    fixed = torch.Generator().manual_seed(1)
    first, second = torch.randn(64, 96, generator=fixed) / 8, torch.randn(96, 32, generator=fixed) / 10
    x = torch.randn(rows, 64, generator=generator)
    return x, torch.tanh(2 * x @ first) @ second * 3


def small_task(rank: int, folder: str, seeds: int, steps: int) -> None:
    """The final loss of one process for each row of ``SMALL`` and each seed, on its own data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=2)
    found = {name: [end_loss(method, seed, steps) for seed in range(seeds)] for name, method in SMALL.items()}
    if rank == 0:
        torch.save(found, Path(folder) / "losses.pt")
    dist.barrier()
    dist.destroy_process_group()


def end_loss(method: dict[str, Any], seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    ddp = DistributedDataParallel(model)  # one bucket: torch's hook fails on gloo with more
    if "ours" in method:
        ddp.register_comm_hook(
            lr.LowRankCommState(model=ddp, **{"start_step": START, **method["ours"]}), lr.low_rank_hook
        )
    elif "torch" in method:
        state = powerSGD_hook.PowerSGDState(
            None,
            method["torch"],
            start_powerSGD_iter=START,
            min_compression_rate=1,
            use_error_feedback=method.get("feedback", True),
            warm_start=method.get("warm", True),
            random_seed=seed,
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(steps):
        x, y = teacher_batch(32, generator)
        optimizer.zero_grad()
        F.mse_loss(ddp(x), y).backward()
        optimizer.step()
    x, y = teacher_batch(4096, torch.Generator().manual_seed(-1))
    with torch.no_grad():
        return float(F.mse_loss(model(x), y))


def small_table(seeds: int, steps: int) -> tuple[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(small_task, (folder, seeds, steps), nprocs=2)
        found = torch.load(Path(folder) / "losses.pt")
    ends = {name: statistics.mean(losses) for name, losses in found.items()}
    rows = [(name, f"{ends[name]:.4f}", " ".join(f"{x:.4f}" for x in losses)) for name, losses in found.items()]
    failed = [
        f"small task, r={rank}: {ends[f'ours r={rank}']:.4f}, torch's hook {ends[f'torch r={rank}']:.4f}"
        for rank in (1, 4)
        if not ends[f"ours r={rank}"] < ends[f"torch r={rank}"]
    ]
    return markdown_table(("", "loss at the end, mean", "of each seed"), rows), failed


def cifar_run(options: tuple[str, ...], seed: int, extra: list[str]) -> tuple[float, float]:
    """Accuracy after the last epoch, and the compression ratio of the bytes sent."""
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE))
    command = (sys.executable, *run, *options, "--seed", str(seed), "--every", "0", *extra)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = re.findall(r"accuracy ([\d.]+) %.*\(([\d.]+) times fewer\)", done.stdout)
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-3000:])
    print(options, seed, done.stdout.splitlines()[-1], flush=True)
    return float(lines[-1][0]), float(lines[-1][1])


def cifar_table(rows: list[str], seeds: int, extra: list[str]) -> tuple[str, list[str]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for seed in range(seeds):
        for name in rows:
            found[name].append(cifar_run(CIFAR[name], seed, extra))
    means = {name: statistics.mean(right for right, _ in runs) for name, runs in found.items()}
    table = [
        (name, f"{means[name]:.2f}", " ".join(f"{right:.2f}" for right, _ in runs), f"{runs[0][1]:.1f}")
        for name, runs in found.items()
    ]
    good = [name for name in rows[1:] if found[name][0][1] >= RATIO and means[name] >= means[rows[0]] - POINTS]
    failed = [] if good else [f"ResNet-20: nothing within {POINTS} points of {rows[0]} at {RATIO} times fewer bytes"]
    return markdown_table(("", "accuracy, mean", "of each seed", "times fewer bytes"), table), failed


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--steps", type=int, default=400, help="steps of the small task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["small", "resnet"], choices=["small", "resnet"])
    parser.add_argument("--epochs", type=int, default=16, help="epochs of ResNet-20")
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--batch", type=int, default=16, help="images per process and step of ResNet-20")
    parser.add_argument("--lr", type=float, default=0.02, help="of ResNet-20")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=list(CIFAR),
        choices=list(CIFAR),
        help="rows to run, compared with the first",
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.seeds, args.parts = 4, 1, ["small"]
    line = machine(args)
    text = f"# Convergence with low-rank gradients\n\n{line} per process; 2 processes, gloo; {args.seeds} seeds.\n\n"
    failed: list[str] = []
    if "small" in args.parts:
        table, failed = small_table(args.seeds, args.steps)
        text += f"## MLP 64-128-128-32 learns a random network, {args.steps} steps of 2 x 32 rows\n\n{table}\n\n"
    if "resnet" in args.parts and available("cifar_resnet"):
        options = [f"--{name}={getattr(args, name)}" for name in ("epochs", "images", "batch", "lr")]
        table, more = cifar_table(args.rows, args.seeds, [*options, "--bf16"])
        failed += more
        text += (
            f"## ResNet-20, {args.images:,} images of CIFAR-10, {args.epochs} epochs\n\nTwo processes of {args.batch}"
            f" images per step, SGD with momentum 0.9, lr {args.lr:g} falling as a cosine, weight decay 5e-4, bf16"
            f" autocast; all 10,000 test images.\n\n{table}\n\n"
        )
    if not args.smoke:
        text += "All bars met." if not failed else "Not met: " + "; ".join(failed) + "."
    name = "ddp_convergence" + ("" if len(args.parts) > 1 else f"_{args.parts[0]}")
    print(f"{text}\nwritten to {write_result(args, name, text)}")
    raise SystemExit(bool(failed) and not args.smoke)


if __name__ == "__main__":
    main()
