"""What one of two processes does in the tests of projected gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

STEPS = 20


def run(rank: int, method: str) -> dict[str, Tensor]:
    """The weights at the end."""
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
    return model.state_dict()
