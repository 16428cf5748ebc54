"""What one of two processes does in the tests of the monitor; see :mod:`tests.processes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr


def build() -> nn.Module:
    """A model with a low-rank layer and an adapter of which neither factor is zero, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), lr.LowRankLinear(10, 8, rank=3), nn.Linear(8, 4))
    lr.add_lora_(model, ["2"], rank=2)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        if float(parameter.detach().abs().sum()) == 0:
            nn.init.normal_(parameter)
    return model


def train(model: nn.Module, inputs: torch.Tensor) -> torch.optim.Optimizer:
    """Two steps by a rate of which the second depends on the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def inputs() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


def monitor_both(rank: int, folder: str) -> dict[str, Any]:
    """The records of DDP and of FSDP2, as JSON, and the files that were written."""
    own = inputs().chunk(2)[rank]
    records = {}
    for name in ("ddp", "fsdp"):
        model = build()
        if name == "ddp":
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        file = f"{folder}/{name}_{rank}.jsonl"
        with lr.SpectrumMonitor(wrapped, every=1, k=3, file=file) as monitor:
            train(wrapped, own)
        records[name] = [record.to_json() for record in monitor.records]
    return records
