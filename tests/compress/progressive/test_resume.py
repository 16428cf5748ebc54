"""A progressive decomposition that is killed and called again ends in the same bits as one that is not."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.recovery import training

from .worker import BUDGETS, STEPS, build, progress

ROOT = Path(__file__).resolve().parents[3]


def same(a: tuple[nn.Module, lr.Progression], b: tuple[nn.Module, lr.Progression]) -> bool:
    states = [model.state_dict() for model, _ in (a, b)]
    equal = states[0].keys() == states[1].keys()
    return equal and a[1] == b[1] and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("kills", [[8], [4, 7]], ids=str)
def test_a_killed_process_loses_nothing(kills, tmp_path):
    """Backward passes of calibration and training count: in the second stage, or in the first and in the next one."""
    for at in kills:
        command = [sys.executable, "-m", "tests.compress.progressive.worker", str(tmp_path), str(at)]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert same(progress(tmp_path), progress(None))


def test_every_step_and_every_stage_can_be_the_last_one_before_an_interruption(tmp_path, monkeypatch):
    expected = progress(None)
    step, calls, at = training.Training.step, [0], 0

    def interrupted(self, batches, done):
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return step(self, batches, done)

    for at in range(1, STEPS * len(BUDGETS) + 1):
        calls[0] = 0
        monkeypatch.setattr(training.Training, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            progress(tmp_path / str(at))
        monkeypatch.setattr(training.Training, "step", step)
        assert same(progress(tmp_path / str(at)), expected)


@pytest.mark.parametrize("kept", [0, 1])
def test_the_last_good_model_is_the_same_after_an_interruption(kept, tmp_path, monkeypatch):
    """The stage that fails is interrupted; the model of the one before comes from the disk."""
    stages = progress(None)[1].stages
    fails = stages[kept].recovery
    monkeypatch.setattr(lr.Recovery, "score", property(lambda recovery: -1e9 if recovery == fails else 1e9))
    expected = progress(None, tolerated=0.0)
    assert expected[1].kept == kept
    step, calls = training.Training.step, [0]

    def interrupted(self, batches, done):
        calls[0] += 1
        if calls[0] == kept * STEPS + 3:
            raise KeyboardInterrupt
        return step(self, batches, done)

    monkeypatch.setattr(training.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        progress(tmp_path, tolerated=0.0)
    monkeypatch.setattr(training.Training, "step", step)
    assert same(progress(tmp_path, tolerated=0.0), expected)


def test_a_foreign_state_is_refused_and_the_model_is_as_it_was(tmp_path):
    progress(tmp_path)
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [(torch.randn(8, 6), torch.arange(8) % 3)]
    with pytest.raises(lr.CheckpointError, match=r"was written with budgets=.*0.8.*got budgets="):
        lr.progressive_(model, [0.5], STEPS, data=data, resume=tmp_path)
    rates = [lr.RecoverySettings(STEPS, lr=rate, save_every=2, validate_every=2) for rate in (0.02, 0.03)]
    with pytest.raises(lr.CheckpointError, match="lr of stage 2"):
        lr.progressive_(model, BUDGETS, rates, data=data, samples=16, resume=tmp_path)
    with pytest.raises(lr.LowRankError, match="which is a file; expected a folder"):
        lr.progressive_(model, [0.5], STEPS, data=data, resume=tmp_path / "progression.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
