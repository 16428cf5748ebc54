"""A progressive decomposition that is killed: ``python -m tests.compress.progressive.worker folder call``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import lowrank_layers as lr

from ..recovery.worker import ROWS, Noisy

STEPS = 4
BUDGETS = [0.8, 0.5]


def build() -> nn.Module:
    torch.manual_seed(3)
    body = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16, bias=False), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(16, 3))


def progress(
    folder: Path | None, kill_at: int | None = None, tolerated: float | None = None
) -> tuple[nn.Module, lr.Progression]:
    """Two stages of four steps, killed in the middle of a step; the state is written every second step."""
    torch.seed()  # what was drawn before the call does not matter
    model, calls = build(), [0]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls[0] += output.requires_grad
        if kill_at is not None and calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(output, target)

    data = DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator())
    validation = [(torch.stack([x for x, _ in ROWS]), torch.tensor([y for _, y in ROWS]))]
    settings = lr.RecoverySettings(STEPS, lr=0.02, save_every=2, validate_every=2)
    told = {"data": data, "loss": loss, "validation": validation, "samples": 16}
    return model, lr.progressive_(model, BUDGETS, settings, **told, tolerated=tolerated, resume=folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    progress(Path(sys.argv[1]), int(sys.argv[2]))
