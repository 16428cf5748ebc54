"""A recovery in a process that is killed: ``python -m tests.compress.recovery.worker folder call``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import lowrank_layers as lr

STEPS = 12
ROWS = [(torch.full((6,), k / 40), k % 3) for k in range(40)]


class Noisy(torch.utils.data.Dataset):
    """Rows with noise from torch's generator, as augmentation has it."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, int]:
        return ROWS[k][0] + 0.1 * torch.randn(6), ROWS[k][1]


def build() -> nn.Module:
    torch.manual_seed(3)
    body = [lr.LowRankLinear(6, 16, rank=2), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)]
    return nn.Sequential(*body)


def recover(folder: Path | None, kill_at: int | None = None) -> tuple[nn.Module, lr.Recovery]:
    """The recovery, killed in the middle of a step; the state is written every second step."""
    torch.seed()  # what was drawn before the call does not matter
    model, calls = build(), [0]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls[0] += model.training
        if kill_at is not None and calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(output, target)

    data = DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator())
    validation = [(torch.stack([x for x, _ in ROWS]), torch.tensor([y for _, y in ROWS]))]
    settings = lr.RecoverySettings(STEPS, lr=0.02, accumulate=2, save_every=2, validate_every=3)
    return model, lr.recover_(model, data, settings, loss=loss, validation=validation, resume=folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    recover(Path(sys.argv[1]), int(sys.argv[2]))
