"""Train ResNet-20 on CIFAR-10 in several processes with low-rank gradients, and continue after a crash.

torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp_cifar.py [--hook none|lowrank|powersgd] [--rank 4]

Every ``--every`` steps each process writes its part of a checkpoint: the first one the model and the optimizer, and all
of them the state of their hook. When a process dies, torchrun restarts all of them, and they continue from the newest
complete checkpoint, with the same images in the same order. The images are read from ../shared/data.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.data import ResNetCifar, accuracy, cifar10
from lowrank_layers.files import replacing

TEN_SECONDS = timedelta(seconds=10)


def join() -> None:
    """Joins the process group; torchrun may keep its store, with stale addresses, over a restart: hence the prefix."""
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


def data(source: str, images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training and for testing."""
    if source == "cifar":
        return *(part[:images] for part in cifar10("train")), *cifar10("test")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 32, 32, generator=generator)
    return x, torch.arange(images) % 10, x, torch.arange(images) % 10


def model_of(name: str) -> nn.Module:
    if name == "resnet20":
        return ResNetCifar(20)
    convolutions = (nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def batch_of(x: Tensor, y: Tensor, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """This process's images of a step, shifted and mirrored; they depend only on seed, step and process."""
    share = args.batch * dist.get_world_size()
    epoch, place = divmod(step, len(x) // share)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
    mine = order[place * share : (place + 1) * share].chunk(dist.get_world_size())[dist.get_rank()]
    random = torch.Generator().manual_seed((args.seed * 1_000_000 + step) * 1_000 + dist.get_rank())
    right, down = torch.randint(9, (2,), generator=random).tolist()
    images = F.pad(x[mine], (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
    mirrored = torch.rand(len(mine), 1, 1, 1, generator=random) < 0.5
    return torch.where(mirrored, images.flip(3), images), y[mine]


class Run:
    """A training run and its checkpoints."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.folder, self.rank, self.step = args.out, dist.get_rank(), 0
        self.model = model_of(args.model).to(memory_format=torch.channels_last)
        # one bucket: so small a model sends all at once, and torch's hook fails on gloo with more
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=25)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
        self.hook = None
        if args.hook == "lowrank":
            wire = getattr(torch, args.wire) if args.wire else None
            self.hook = lr.LowRankCommState(
                args.rank, model=self.ddp, alternate=args.alternate, wire=wire, timeout=TEN_SECONDS
            )
            self.ddp.register_comm_hook(self.hook, lr.low_rank_hook)
        elif args.hook == "powersgd":
            self.theirs = powerSGD_hook.PowerSGDState(
                None, args.rank, start_powerSGD_iter=2, min_compression_rate=1, compression_stats_logging_frequency=1
            )
            self.ddp.register_comm_hook(self.theirs, powerSGD_hook.powerSGD_hook)
        self.kind = args.hook

    def save(self) -> None:
        """Writes this process's part atomically; deletes older checkpoints when all processes have written theirs."""
        new = self.folder / f"step{self.step:08}"
        new.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self._write(new / "model.pt", {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        self._write(new / f"hook{self.rank}.pt", {} if self.hook is None else self.hook.state_dict())
        dist.barrier()
        if self.rank == 0:
            for old in self.folder.glob("step*"):
                if old != new:
                    shutil.rmtree(old)

    def resume(self) -> None:
        """Loads the newest checkpoint of which every process has its part."""
        names = ["model.pt", *(f"hook{rank}.pt" for rank in range(dist.get_world_size()))]
        found = [0] + [int(p.name[4:]) for p in self.folder.glob("step*") if all((p / n).exists() for n in names)]
        newest = torch.tensor(max(found))
        dist.broadcast(newest, 0)
        self.step = int(newest)
        if not self.step:
            return
        folder = self.folder / f"step{self.step:08}"
        saved = torch.load(folder / "model.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.hook is not None:
            self.hook.load_state_dict(torch.load(folder / f"hook{self.rank}.pt", weights_only=True))
        print(f"process {self.rank}: goes on after step {self.step}", flush=True)

    def traffic(self, steps: int) -> tuple[int, float]:
        """Bytes that this process has sent since it started, and the compression ratio."""
        whole = steps * sum(p.nbytes for p in self.model.parameters())
        if self.kind == "lowrank":
            sent = self.hook.stats()["bytes_sent"]
        elif self.kind == "powersgd":
            # its own statistics, which leave vectors out
            _, before, after = self.theirs.compression_stats()
            sent = whole - 4 * (before - after)
        else:
            sent = whole
        return sent, whole / max(1, sent)

    @staticmethod
    def _write(path: Path, what: dict) -> None:
        with replacing(path) as temporary:
            torch.save(what, temporary)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook", default="lowrank", choices=["none", "lowrank", "powersgd"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alternate", action="store_true", help="one collective per step, half the bytes")
    parser.add_argument("--wire", choices=["float16", "bfloat16", "int8"], help="dtype sent; by default fp32")
    parser.add_argument("--model", default="resnet20", choices=["resnet20", "small"])
    parser.add_argument("--data", default="cifar", choices=["cifar", "random"])
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="images per process and step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints; 0 writes none")
    parser.add_argument("--out", type=Path, default=Path("ddp_cifar_out"))
    return parser.parse_args(given)


def train(args: argparse.Namespace) -> None:
    """Trains from the newest checkpoint to the end; called in each process of a group."""
    x, y, test_x, test_y = data(args.data, args.images)
    run = Run(args)
    run.resume()
    an_epoch = len(x) // (args.batch * dist.get_world_size())
    last, began, start = args.epochs * an_epoch, run.step, time.perf_counter()
    if an_epoch == 0:
        raise SystemExit(f"{len(x)} images are not enough for one step")
    run.model.train()
    losses = []
    while run.step < last:
        # linear warm-up over the first epoch, then a cosine
        rate = min((run.step + 1) / an_epoch, 0.5 + 0.5 * math.cos(math.pi * run.step / last))
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * rate
        images, labels = batch_of(x, y, args, run.step)
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(run.ddp(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
        run.step += 1
        if args.every and (run.step % args.every == 0 or run.step == last):
            run.save()
        if run.step % an_epoch == 0 and dist.get_rank() == 0:
            sent, ratio = run.traffic(run.step - began)
            # all test images are for the end
            some = len(test_x) if run.step == last else 2000
            right = accuracy(run.model, test_x[:some], test_y[:some])
            run.model.train()
            print(
                f"epoch {run.step // an_epoch}: loss {sum(losses) / len(losses):.4f}, accuracy {right:.2f} %, "
                f"{sent:,} bytes sent ({ratio:.1f} times fewer), {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            losses = []


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    join()
    print(f"process {dist.get_rank()} has the id {os.getpid()}", flush=True)
    train(args)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
