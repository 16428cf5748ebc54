"""The spectrum of a path of training equals numpy's of all differences at once."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_layers as lr


def trained(steps):
    """A small model, and its state before training and after every step."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    states = [copy.deepcopy(model.state_dict())]
    x, y = torch.randn(40, 6).double(), torch.randn(40, 3).double()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    return model, states


def test_equals_numpy():
    model, states = trained(9)
    flat = np.stack(
        [
            np.concatenate([t.double().flatten().numpy() for t in state.values() if t.is_floating_point()])
            for state in states
        ]
    )
    differences = flat[1:] - flat[0]
    u, s, _ = np.linalg.svd(differences, full_matrices=False)
    found = lr.trajectory_spectrum([*states[:-1], model])
    assert found.spectrum.shape == differences.shape
    assert found.spectrum.values.numpy() == pytest.approx(s, rel=1e-5)
    energy = s**2 / (s**2).sum()
    assert found.explained.numpy() == pytest.approx(energy, rel=1e-5)
    assert found.directions_for(0.99) == np.searchsorted(energy.cumsum(), 0.99) + 1
    assert np.abs(found.projections.numpy()) == pytest.approx(np.abs(u * s), rel=1e-5, abs=1e-6 * s[0])
    # projections keep all distances between checkpoints
    assert (found.projections @ found.projections.mT).numpy() == pytest.approx(differences @ differences.T)
    change = (states[-1]["0.weight"] - states[0]["0.weight"]).numpy()
    assert list(found.changes) == ["0.weight", "3.weight"]
    assert found.changes["0.weight"].values.numpy() == pytest.approx(np.linalg.svd(change)[1], rel=1e-5)
    assert "directions hold 99 %" in str(found)


def test_fewer_parameters_than_checkpoints():
    path = torch.randn(7, 2, dtype=torch.float64)
    found = lr.trajectory_spectrum([{"w": row} for row in path])
    s = np.linalg.svd((path[1:] - path[0]).numpy(), compute_uv=False)
    assert found.spectrum.values.numpy() == pytest.approx(s, rel=1e-5)
    assert found.projections.shape == (6, 2)
    assert str(found)


def test_scalars_count():
    found = lr.trajectory_spectrum([{"w": torch.zeros(2), "scale": torch.tensor(float(t))} for t in range(3)])
    assert found.spectrum.shape == (2, 3)
    assert found.spectrum.values.tolist() == pytest.approx([5**0.5, 0])


def test_refuses():
    model = nn.Linear(3, 2)
    with pytest.raises(lr.LowRankError, match="got 1 checkpoints, expected at least 2"):
        lr.trajectory_spectrum([model])
    with pytest.raises(lr.LowRankError, match=r"never change; .* copy\.deepcopy"):
        lr.trajectory_spectrum([model.state_dict(), model.state_dict()])
    with pytest.raises(lr.LowRankError, match="checkpoint 1 has other tensors"):
        lr.trajectory_spectrum([model, nn.Linear(3, 4)])
    with pytest.raises(lr.LowRankError, match="got list, expected a model or a state dict"):
        lr.trajectory_spectrum([[torch.ones(2)], model])
    with pytest.raises(lr.LowRankError, match="'w': got NaN or Inf"):
        lr.trajectory_spectrum([{"w": torch.ones(2)}, {"w": torch.full((2,), float("nan"))}])
