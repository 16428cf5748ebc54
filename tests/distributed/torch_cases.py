"""The same against torch's own hook: what happens there is recorded, not judged."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from .hook_worker import Case, Scaled, batches, caught, difference, flat, made, train, wrap


def peer(model: nn.Module, hook: Any = powerSGD_hook.powerSGD_hook, state: Any = None, **ddp: Any) -> tuple[Any, Any]:
    wrapped, _ = wrap(model, None, **{"bucket_cap_mb": 25, **ddp})
    if state is None:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    wrapped.register_comm_hook(state, hook)
    return wrapped, state


def many_buckets(rank: int) -> float:
    wrapped, _ = peer(made(), bucket_cap_mb=0.005)
    train(wrapped, batches(rank, 12))
    return difference(flat(wrapped))


def unused(rank: int) -> float:
    wrapped, _ = peer(made(), bucket_cap_mb=0.005, find_unused_parameters=True)
    for step, pair in enumerate(batches(rank, 12)):
        train(wrapped, [pair], branch=step % 2 == 0)
    return difference(flat(wrapped))


def zero_gradient(rank: int) -> bool:
    wrapped, _ = peer(made())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02)
    for x, _ in batches(rank, 5):
        optimizer.zero_grad()
        (wrapped(x).sum() * 0).backward()
        optimizer.step()
    return bool(flat(wrapped).isfinite().all())


def non_finite(rank: int) -> list[bool]:
    """Whether the gradients of each step are finite; one input is not."""
    wrapped, _ = peer(made())
    out = []
    for step, (x, y) in enumerate(batches(rank, 9)):
        wrapped.zero_grad()
        nn.functional.mse_loss(wrapped(x * torch.inf if step == 4 and rank == 1 else x), y).backward()
        out.append(all(bool(p.grad.isfinite().all()) for p in wrapped.parameters()))
    return out


def halved_scale(rank: int) -> list[float]:
    norms = []
    for factor in (1.0, 0.5):
        wrapped, _ = peer(made())
        for step, (x, y) in enumerate(batches(rank, 9)):
            scale = 65536 * (factor if step == 8 else 1)
            wrapped.zero_grad()
            (nn.functional.mse_loss(wrapped(x), y) * scale).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in wrapped.parameters()]).norm()) / scale)
    return norms


def resume(rank: int) -> float:
    """The first update after a resume, against never having stopped; in part of its size."""
    model = made()
    wrapped, state = peer(model)
    train(wrapped, batches(rank, 9))
    kept, weights = pickle.dumps(state), {k: v.clone() for k, v in model.state_dict().items()}
    before = flat(model)
    train(wrapped, batches(rank, 1, 9))
    again = made()
    again.load_state_dict(weights)
    rewrapped, _ = peer(again, state=pickle.loads(kept))
    train(rewrapped, batches(rank, 1, 9))
    return float((flat(again) - flat(model)).norm() / (flat(model) - before).norm())


def frozen_on_resume(rank: int) -> float:
    model = made()
    wrapped, state = peer(model)
    train(wrapped, batches(rank, 6))
    model.middle.requires_grad_(False)
    wrapped, _ = peer(model, state=pickle.loads(pickle.dumps(state)))
    train(wrapped, batches(rank, 6))
    return difference(flat(wrapped))


def weights_only(rank: int) -> None:
    _, state = peer(made())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.load(file, weights_only=True)


def batched(rank: int) -> None:
    wrapped, _ = peer(made(), powerSGD_hook.batched_powerSGD_hook)
    train(wrapped, batches(rank, 4))


def scalar_parameter(rank: int) -> None:
    wrapped, _ = peer(made(Scaled))
    train(wrapped, batches(rank, 4))


def half_precision(rank: int) -> float:
    matrix = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    powerSGD_hook._orthogonalize(matrix)
    gram = (matrix.mT.float() @ matrix.float())[0]
    return float((gram - torch.eye(8)).abs().max())


def bf16_wire(rank: int) -> None:
    wrapped, _ = peer(made(), default_hooks.bf16_compress_wrapper(powerSGD_hook.powerSGD_hook))
    train(wrapped, batches(rank, 4))


TOGETHER: list[Case] = [
    weights_only,
    half_precision,
    zero_gradient,
    non_finite,
    halved_scale,
    resume,
    batched,
    scalar_parameter,
    bf16_wire,
    frozen_on_resume,
]


def run_together(rank: int) -> dict[str, Any]:
    """Those that end on all processes alike."""
    return {case.__name__: caught(case, rank) for case in TOGETHER}
