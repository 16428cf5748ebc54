"""The factors: as in torch's own PowerSGD, exact at full rank, better with local iterations."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from .cases import batches, flat, layers, made, train, wrap

EXACT, TIGHT = 0.0, 1e-5


def case_torchs_hook(rank: int) -> dict[str, float]:
    """One matrix in one bucket, where torch's hook works: ours goes on from its directions and errors."""

    def matrix() -> nn.Module:
        return nn.Linear(32, 8, bias=False)

    theirs = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1)
    wrapped, _ = wrap(made(matrix), None)
    wrapped.register_comm_hook(theirs, powerSGD_hook)
    train(wrapped, batches(rank, 6))
    ours, state = wrap(made(matrix), {"rank": 2, "local_iterations": 0})
    ours.load_state_dict(wrapped.state_dict())
    memory = {"right.weight": theirs.q_memory_dict[0].view(1, 32, 2), "scale.weight": torch.tensor(1.0)}
    error = {f"process{rank}.error.weight": theirs.error_dict[0].view(1, 8, 32)}
    state.load_state_dict({"step": torch.tensor(6), "processes": torch.tensor(2), **memory, **error})
    before = flat(wrapped)
    for model in (wrapped, ours):
        train(model, batches(rank, 6, 6))
    moved = (flat(wrapped) - before).norm()
    return {"apart": float((flat(ours) - flat(wrapped)).norm() / moved), "moved": float(moved)}


def test_torchs_hook(seen):
    for process in seen:
        assert process["moved"] > 0
        assert process["apart"] < TIGHT


def case_full_rank_alternate(rank: int) -> float:
    """One product with a square orthonormal basis loses nothing."""

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8, bias=False))

    weights = []
    for settings in (None, {"rank": 32, "saving": 0.5, "alternate": True}):
        wrapped, _ = wrap(made(square), settings)
        train(wrapped, batches(rank, 30))
        weights.append(flat(wrapped))
    return float((weights[0] - weights[1]).abs().max() / weights[0].abs().max())


def test_full_rank_alternate(seen):
    assert max(seen) < TIGHT


def case_local_iterations(rank: int) -> dict[str, list[float]]:
    """Relative errors of the first averaged gradients, by iterations; both processes have the same gradient."""
    x, y = batches(0, 1)[0]
    plain, _ = wrap(made(), None)
    nn.functional.mse_loss(plain(x), y).backward()
    out = {}
    for iterations in (0, 1, 2):
        wrapped, state = wrap(made(), {"rank": 2, "local_iterations": iterations})
        nn.functional.mse_loss(wrapped(x), y).backward()
        pairs = zip(wrapped.module.named_parameters(), plain.parameters(), strict=True)
        missed = [float((p.grad - q.grad).norm() / q.grad.norm()) for (n, p), q in pairs if n in layers(state)]
        out[str(iterations)] = missed
    return out


def test_local_iterations(seen):
    for process in seen:
        assert len(process["0"]) == 4
        for none, one, two in zip(*process.values(), strict=True):
            assert two <= one < none
