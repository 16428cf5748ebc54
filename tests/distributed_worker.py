"""What one of several processes does in the distributed tests; see :mod:`tests.processes`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from .whole_models import MODELS, batch_of, train

WORLD = 2
STEPS = 3
BATCH = 4
"""Samples a process and step."""


def shards(model: nn.Module, rank: int) -> list[tuple[torch.Tensor, ...]]:
    """A process' batches."""
    return [batch_of(model, BATCH, seed=100 * step + rank) for step in range(STEPS)]


def joint(model: nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """The batches of all processes together."""
    parts = [shards(model, rank) for rank in range(WORLD)]
    return [tuple(torch.cat(same) for same in zip(*step, strict=True)) for step in zip(*parts, strict=True)]


def run(rank: int, wrap: str) -> dict[str, Any]:
    return {name: WRAPS[wrap](build(), rank) for name, build in MODELS.items()}


def data_parallel(model: nn.Module, rank: int) -> dict[str, Any]:
    batches = shards(model, rank)
    losses = train(DistributedDataParallel(model), batches)
    return {"losses": losses, "state": model.state_dict()}


def fully_sharded(model: nn.Module, rank: int) -> dict[str, Any]:
    batches = shards(model, rank)
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.modules():
        if isinstance(module, lr.FactoredModule):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(p.to_local().numel() for p in model.parameters())
    losses = train(model, batches)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses, "state": state, "held": held}


WRAPS = {"ddp": data_parallel, "fsdp": fully_sharded}
