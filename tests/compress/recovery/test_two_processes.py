"""Two processes recover what one would on both batches together, and end with equal replicas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from ...processes import run_processes


def build(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    body = [lr.LowRankLinear(6, 8, rank=3), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*body).double()


def batches(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6, 4, 6, generator=generator, dtype=torch.float64)
    return [(inputs, torch.randint(3, (4,), generator=generator)) for inputs in x]


def joined(a: list[Any], b: list[Any]) -> list[Any]:
    return [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(a, b, strict=True)]


def recover(model: nn.Module, bare: nn.Module, data: list[Any], held_out: list[Any], **changes: Any) -> lr.Recovery:
    """Against labels and a teacher; hidden states are not a mean over samples, and so are left out."""
    teacher = copy.deepcopy(bare)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    told = {"loss": nn.functional.cross_entropy, "teacher": teacher, "trainable": "factors", "validation": held_out}
    settings = lr.RecoverySettings(8, lr=0.02, accumulate=2, validate_every=2, save_every=2)
    return lr.recover_(model, data, settings, **{**told, **changes})


def work(rank: int, norm: bool, folder: str | None, interrupt: bool) -> dict[str, Any]:
    model = build(norm)
    replica = DistributedDataParallel(model)
    held_out = batches(rank)
    if interrupt:
        seen = [0]

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            seen[0] += model.training
            if seen[0] == 10:
                raise InterruptedError
            return nn.functional.cross_entropy(output, target)

        with pytest.raises(InterruptedError):
            recover(replica, build(norm), batches(rank), held_out, loss=loss, resume=folder)
        model = build(norm)
        replica = DistributedDataParallel(model)
    recovery = recover(replica, build(norm), batches(rank), held_out, resume=folder)
    return {"state": copy.deepcopy(model.state_dict()), "recovery": recovery}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_two_processes_do_what_one_does_on_all_data(tmp_path):
    first, second = run_processes(work, tmp_path / "group", False, None, False)
    assert equal(first["state"], second["state"])
    assert first["recovery"] == second["recovery"]
    model = build(False)
    joint = joined(batches(0), batches(1))
    recovery = recover(model, build(False), joint, joint)
    assert recovery.best_step == first["recovery"].best_step > 0
    assert recovery.losses == pytest.approx(first["recovery"].losses, rel=1e-10)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, first["state"][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [False, True])
def test_resuming_in_two_processes_gives_the_same_result(norm, tmp_path):
    whole = run_processes(work, tmp_path / "group", norm, None, False)
    resumed = run_processes(work, tmp_path / "group", norm, str(tmp_path / "state"), True)
    for each in (*whole, *resumed):
        assert equal(each["state"], whole[0]["state"])
        assert each["recovery"] == whole[0]["recovery"]
    assert [path.name for path in Path(tmp_path / "state").iterdir()] == ["recovery.pt"]
