"""Factored models trained by two processes, through Trainer and through accelerate with the hook of gradients."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

from ...processes import run_processes
from .models import KINDS
from .training import flat, rows, trainer

accelerate = pytest.importorskip("accelerate")
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A factored model, saved."""
    KINDS["llama"].factored().save_pretrained(tmp_path / "model")
    return tmp_path


def as_torchrun(rank: int) -> None:
    """Sets what torchrun tells its processes."""
    with contextlib.suppress(ImportError):
        import_torchvision()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")


def by_trainer(rank: int, folder: Path) -> torch.Tensor:
    as_torchrun(rank)
    model = KINDS["llama"].load(folder / "model")
    run = trainer(model, folder / "run", **PLAIN, data=rows(4), per_device_train_batch_size=2)
    assert run.args.world_size == 2
    run.train()
    run.save_model(folder / "trained by trainer")
    return flat(model)


def by_accelerate(rank: int, folder: Path) -> tuple[torch.Tensor, list[int]]:
    """The parameters after four steps, and the ranks that gradients of factors had in the last."""
    as_torchrun(rank)
    model = KINDS["llama"].load(folder / "model")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ddp, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    ddp.register_comm_hook(lr.LowRankCommState(rank=4, model=model), lr.low_rank_hook)
    ids = torch.stack([row["input_ids"] for row in rows(4)[2 * rank : 2 * rank + 2]])
    for _ in range(4):
        optimizer.zero_grad()
        ddp(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "trained by accelerate", is_main_process=rank == 0)
    layers = [module for module in model.modules() if isinstance(module, lr.LowRankLinear)]
    return flat(model), [int(torch.linalg.matrix_rank(layer.down.weight.grad)) for layer in layers]


def both(rank: int, folder: Path) -> tuple[torch.Tensor, tuple[torch.Tensor, list[int]]]:
    return by_trainer(rank, folder), by_accelerate(rank, folder)


def test_trainer_takes_the_steps_of_one_process_and_accelerate_averages_at_low_rank(folder):
    one, other = run_processes(both, folder / "processes", folder, seconds=240, timeout=120)
    by_trainer, (by_accelerate, ranks) = one
    assert torch.equal(by_trainer, other[0])
    expected = KINDS["llama"].load(folder / "model")
    start = flat(expected)
    trainer(expected, folder / "one", **PLAIN, data=rows(4)).train()
    torch.testing.assert_close(by_trainer, flat(expected), atol=1e-5, rtol=1e-4)
    assert (by_trainer - start).norm() > 1e-2
    assert torch.equal(flat(KINDS["llama"].load(folder / "trained by trainer")), by_trainer)
    assert torch.equal(by_accelerate, other[1][0])
    assert ranks
    assert max(ranks) <= 4
    assert torch.equal(flat(KINDS["llama"].load(folder / "trained by accelerate")), by_accelerate)
