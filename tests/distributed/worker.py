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


def run_shared(rank: int) -> dict[str, dict[str, object]]:
    """With the hook's factors, of a rank below, at and above the projection's."""
    out: dict[str, dict[str, object]] = {}
    for hook_rank in (1, 3, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12))
        wrapped = DistributedDataParallel(model)
        state = lr.LowRankCommState(rank=hook_rank, model=model)
        wrapped.register_comm_hook(state, lr.low_rank_hook)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = lr.LowRankProjection(inner, rank=3, refresh=2, method="random", comm_state=state)
        generator = torch.Generator().manual_seed(1 + rank)
        target = torch.randn(24, 12, generator=torch.Generator().manual_seed(9))
        lost, losses = [], []
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(16, 24, generator=generator)
            loss = nn.functional.mse_loss(wrapped(x), x @ target)
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            if step % 2 == 0:
                for p in (model[0].weight, model[2].weight):
                    left, right = state.factors(p)
                    short = left if p.shape[0] < p.shape[1] else right
                    basis = optimizer._shadows[p].basis
                    kept = torch.linalg.svdvals(basis.mT @ torch.linalg.qr(short).Q)
                    lost.append(float((1 - kept).abs().max()))
        out[str(hook_rank)] = {
            "lost": lost,
            "losses": losses,
            "orthonormal": float((basis.mT @ basis - torch.eye(3)).abs().max()),
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
            "fits": [optimizer._shadows[p].fits for p in (model[0].weight, model[2].weight)],
        }
    return out
