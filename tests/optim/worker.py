"""What one of two processes does in the tests of projections: every case in one start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from .common import METHODS

STEPS = 20
HOOK_RANKS = (1, 3, 5)
"""Below, at and above the rank of the projection."""


def run(rank: int) -> dict[Any, Any]:
    """Results by projection method, and by rank of the hook."""
    found: dict[Any, Any] = {method: weights(rank, method) for method in METHODS}
    return found | {hook_rank: shared(rank, hook_rank) for hook_rank in HOOK_RANKS}


def weights(rank: int, method: str) -> dict[str, Tensor]:
    """The weights at the end, without a hook."""
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


def shared(rank: int, hook_rank: int) -> dict[str, Any]:
    """Training with projectors from the factors of the hook."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12))
    wrapped = DistributedDataParallel(model)
    hook_state = lr.LowRankCommState(rank=hook_rank, model=model)
    wrapped.register_comm_hook(hook_state, lr.low_rank_hook)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = lr.LowRankProjection(inner, rank=3, refresh=2, method="random", comm_state=hook_state)
    generator = torch.Generator().manual_seed(1 + rank)
    target = torch.randn(24, 12, generator=torch.Generator().manual_seed(9))
    matrices = {0: model[0].weight, 2: model[2].weight}  # by their index in the optimizer's state
    lost, losses, bent = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 24, generator=generator)
        loss = nn.functional.mse_loss(wrapped(x), x @ target)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        if step % 2 == 0:
            state = optimizer.state_dict()["state"]
            for index, p in matrices.items():
                left, right = hook_state.factors(p)
                short = left if p.shape[0] < p.shape[1] else right
                projector = state[index]["projector"]
                kept = torch.linalg.svdvals(projector.mT @ torch.linalg.qr(short).Q)
                lost.append(float((1 - kept).abs().max()))
                bent.append(float((projector.mT @ projector - torch.eye(3)).abs().max()))
    return {
        "lost": lost,
        "losses": losses,
        "orthonormal": max(bent),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "fits": [optimizer.state_dict()["state"][index]["projector_fits"] for index in matrices],
    }
