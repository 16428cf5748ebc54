"""A recovery that is killed and called again ends in the same bits as one that is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .worker import STEPS, build, recover

ROOT = Path(__file__).resolve().parents[3]


def killed(folder: Path, at: int) -> None:
    command = [sys.executable, "-m", "tests.compress.recovery.worker", str(folder), str(at)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL


def same(a: tuple[nn.Module, lr.Recovery], b: tuple[nn.Module, lr.Recovery]) -> bool:
    states = [model.state_dict() for model, _ in (a, b)]
    return a[1] == b[1] and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("kills", [[1], [6], [11], [24], [4, 8, 9]], ids=str)
def test_a_killed_process_loses_nothing(kills, tmp_path):
    """Of 24 backward passes, in the first step or later, before or after the first state, once or several times."""
    for at in kills:
        killed(tmp_path, at)
    assert same(recover(tmp_path), recover(None))


def test_every_step_can_be_the_last_one_before_an_interruption(tmp_path, monkeypatch):
    from lowrank_layers.compress.recovery import training

    expected = recover(None)
    steps = training.Training.step

    for at in range(STEPS):

        def step(self, batches, done, at=at):
            if done == at:
                raise KeyboardInterrupt
            return steps(self, batches, done)

        monkeypatch.setattr(training.Training, "step", step)
        with pytest.raises(KeyboardInterrupt):
            recover(tmp_path / str(at))
        monkeypatch.setattr(training.Training, "step", steps)
        assert same(recover(tmp_path / str(at)), expected)


def test_a_finished_recovery_is_read_back(tmp_path):
    expected = recover(tmp_path)
    assert same(recover(tmp_path, kill_at=1), expected)  # no step is left in which to be killed


def test_a_write_that_is_killed_leaves_the_state_before(tmp_path):
    killed(tmp_path, 11)
    (tmp_path / ".recovery.pt.1.tmp").write_bytes(b"half a fi")
    assert same(recover(tmp_path), recover(None))
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.pt"]


def test_a_foreign_state_is_refused_and_the_model_is_as_it_was(tmp_path):
    recover(tmp_path)
    data = [(torch.randn(8, 6), torch.arange(8) % 3)]
    same_settings = {"lr": 0.02, "accumulate": 2, "validate_every": 3}
    other = nn.Sequential(nn.Linear(6, 3))

    def refused(match: str, model: nn.Module, folder: Path = tmp_path, steps: int = STEPS, **told: object) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(lr.LowRankError, match=match):
            lr.recover_(model, data, steps, resume=folder, **{**same_settings, **told})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    refused("was written with lr=0.02, got lr=0.1", build(), lr=0.1)
    refused("it is the state of another model", other)
    refused("or other parameters are trained", build().requires_grad_(False).append(nn.Linear(3, 3)))
    model = build()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    refused("that of AdamW, got the optimizer SGD", model, optimizer=sgd)
    (tmp_path / "torn").mkdir()
    whole = (tmp_path / "recovery.pt").read_bytes()
    (tmp_path / "torn" / "recovery.pt").write_bytes(whole[: len(whole) // 2])
    refused("is torn or no state of a recovery", build(), folder=tmp_path / "torn")
    refused("which is a file; expected a folder", build(), folder=tmp_path / "recovery.pt")
    torch.save([1], tmp_path / "torn" / "recovery.pt")
    refused("was not written by recover_", build(), folder=tmp_path / "torn")
