"""The recorder keeps what training made of the weights, and a trajectory takes it as it is."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr


def test_it_keeps_the_trained_parameters_every_few_steps():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    states = [copy.deepcopy(model.state_dict())]
    with lr.CheckpointRecorder(model, every=3) as recorder:
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
            states.append(copy.deepcopy(model.state_dict()))
    assert len(recorder) == 3
    trained = ["0.weight", "0.bias", "1.weight", "1.bias"]
    for checkpoint, state in zip(recorder, states[::3], strict=True):
        assert list(checkpoint) == trained
        for name in trained:
            assert torch.equal(checkpoint[name], state[name])
    kept = [{name: state[name] for name in trained} for state in states[::3]]
    found, expected = lr.trajectory_spectrum(recorder), lr.trajectory_spectrum(kept)
    torch.testing.assert_close(found.spectrum.values, expected.spectrum.values)


def test_a_second_block_goes_on():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = lr.CheckpointRecorder(model, every=1)
    for _ in range(2):
        with recorder:
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
    assert len(recorder) == 3


def test_nothing_recorded_is_an_error_of_the_trajectory():
    with pytest.raises(lr.LowRankError, match="got 0 checkpoints"):
        lr.trajectory_spectrum(lr.CheckpointRecorder(nn.Linear(2, 2)))
    with pytest.raises(lr.LowRankError, match="CheckpointRecorder: got every=0"):
        lr.CheckpointRecorder(nn.Linear(2, 2), every=0)
