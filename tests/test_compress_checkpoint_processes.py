"""Several processes compress a checkpoint together, each with a part of the data, as one does with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_layers as lr

from .processes import run_processes

BUDGET = lr.Budget(params=0.6)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 32, generator=generator) for count in (40, 8, 24, 16)]


def energy(output: Tensor, _: Any) -> Tensor:
    return output.square().sum(1).mean()


def compressed(folder: Path, target: str, own: list[Tensor]) -> lr.Plan:
    with torch.device("meta"):
        model = dense()
    pairs = [(batch, torch.zeros(len(batch))) for batch in own]
    return lr.compress_checkpoint(
        folder / "dense.safetensors", folder / target, BUDGET, pairs, model=model, loss=energy
    )


def together(rank: int, folder: Path) -> list[Any]:
    found: list[Any] = [compressed(folder, "two", batches()[rank::2])]
    for target, own in (("two", batches()[rank::2]), ("three", [] if rank else batches())):
        try:
            compressed(folder, target, own)
        except lr.LowRankError as error:
            found.append(str(error))
    return found


def test_two_processes_with_half_the_data_give_what_one_gives(tmp_path):
    torch.manual_seed(0)
    save_file(dense().state_dict(), tmp_path / "dense.safetensors")
    plan = compressed(tmp_path, "one", batches())
    ranks = run_processes(together, tmp_path / "ranks", tmp_path)
    for found, full, empty in ranks:
        assert [(entry.name, entry.method, entry.rank) for entry in found] == [
            (entry.name, entry.method, entry.rank) for entry in plan
        ]
        assert "is not empty" in full
        assert "no batches" in empty
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "three").exists()
