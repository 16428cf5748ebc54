"""Lesson 7: train in two processes that send low-rank gradients.

python examples/07_gradients.py [--rank 4] [--epochs 20] [--out DIR]

Two processes on this machine train one model by DistributedDataParallel, each on its half of the digits: with plain
averaging, and with PowerSGD as a communication hook, which is two lines. Under torchrun it is the same; ddp_cifar.py
trains that way, with checkpoints that survive a killed process.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from course import begin, lesson, save
from digits import accuracy, build, digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr
from lowrank_layers import plot

EVERY = 10


def train(process: int, settings: lr.PowerSGDSettings | None, epochs: int) -> dict:
    """Trains on this process's half of the digits; the bytes it sent, its losses, and the accuracy."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = build()
    ddp = DistributedDataParallel(model)
    if settings is not None:
        state = lr.LowRankCommState(settings, model=ddp)
        ddp.register_comm_hook(state, lr.low_rank_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    whole = sum(p.nbytes for p in model.parameters())
    points, losses, sent = [], [], 0
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order[: len(x) // 64 * 64].view(-1, 64):
            mine = batch.chunk(2)[process]
            loss = nn.functional.cross_entropy(ddp(x[mine]), y[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            sent = len(losses) * whole if settings is None else state.stats()["bytes_sent"]
            if len(losses) % EVERY == 0:
                points.append((sent, sum(losses[-EVERY:]) / EVERY))
    return {"sent": sent, "points": points, "accuracy": accuracy(model.eval(), x_test, y_test)}


def work(process: int, args: argparse.Namespace) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args.out.resolve()}/meeting", rank=process, world_size=2)
    ways = {
        "plain averaging": None,
        f"rank {args.rank}": lr.PowerSGDSettings(args.rank),
        f"rank {args.rank}, sent as int8": lr.PowerSGDSettings(args.rank, wire=torch.int8),
    }
    runs = {label: train(process, settings, args.epochs) for label, settings in ways.items()}
    if process == 0:
        torch.save(runs, args.out / "runs.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = lesson(__doc__, epochs=20)
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    begin(args)
    (args.out / "meeting").unlink(missing_ok=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")
    torch.multiprocessing.spawn(work, (args,), nprocs=2)
    runs = torch.load(args.out / "runs.pt", weights_only=True)

    print(f"{'':26}{'sent by each process':>22}{'read correctly':>18}")
    for label, run in runs.items():
        fewer = runs["plain averaging"]["sent"] / run["sent"]
        print(f"{label:26}{run['sent']:>14,} bytes{run['accuracy']:>16.1f} %   {fewer:.1f} times fewer bytes")
    curves = {label: run["points"] for label, run in runs.items()}
    save(plot.loss_against_wire_bytes(curves), args.out / "07_gradients.png")


if __name__ == "__main__":
    main()
