"""What one of two processes does in the tests of projected gradients; the results go to a file a process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

WORLD = 2
STEPS = 20


def run(rank: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=45))
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(80, 32), nn.ReLU(), nn.Linear(32, 5))
        wrapped = DistributedDataParallel(model)
        inner = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        optimizer = lr.LowRankProjection(inner, rank=3, refresh=4, method=method)
        generator = torch.Generator().manual_seed(1 + rank)
        torch.manual_seed(100 + rank)  # the global generators differ, and must not matter
        for _ in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(6, 3, 12, generator=generator)
            y = torch.randint(5, (6,), generator=generator)
            nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
        torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
