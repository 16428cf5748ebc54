"""What one of two processes does in the tests of adapters; see :mod:`tests.processes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from .peer import scramble

WORLD = 2
STEPS = 3
BATCH = 4
"""Samples a process and step."""


class Blocks(nn.Module):
    """A table, an attention inside an encoder layer, a convolution and a head; no row depends on another."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.conv = nn.Conv1d(16, 12, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(12, 5)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        features = self.conv(self.encoder(self.table(indices)).mT).relu()
        out: torch.Tensor = self.head(features.mean(-1))
        return out


def adapted(dora: bool = False) -> Blocks:
    """Adapters on every weight, the same in every process."""
    torch.manual_seed(0)
    model = Blocks()
    lr.add_lora_(model, lambda *_: True, rank=3, alpha=6, seed=1, dora=dora)
    scramble(model)
    return model


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return (
        torch.randint(11, (BATCH, 6), generator=generator),
        torch.randint(5, (BATCH,), generator=generator),
    )


def joint() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of all processes together."""
    parts = [[batch(step, rank) for rank in range(WORLD)] for step in range(STEPS)]
    return [(torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) for part in parts]


def train(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def run(rank: int, wrap: str) -> dict[str, Any]:
    return WRAPS[wrap]([batch(step, rank) for step in range(STEPS)])


def data_parallel(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    model = adapted()
    losses = train(DistributedDataParallel(model), batches)
    return {"losses": losses, "state": model.state_dict()}


def fully_sharded(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    model = adapted()
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(p.to_local().numel() for p in model.parameters())
    losses = train(model, batches)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "state": state, "held": held}


WRAPS = {"ddp": data_parallel, "fsdp": fully_sharded}
