"""The error of a stage's output is that of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_layers.compress.refinement import output_error as module
from lowrank_layers.compress.refinement.output_error import OutputError, channel_dim_of, output_moments, rows_of

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def test_moments_are_those_of_outputs_and_gradients():
    model, labels = net(), torch.arange(50) % 3
    found = output_moments(model, ["0", "2"], [(X[:20], labels[:20]), (X[20:], labels[20:])], F.cross_entropy, None)
    assert all(p.grad is None for p in model.parameters())
    hidden = model[0](X).detach().requires_grad_()
    logits = model[2](model[1](hidden))
    gradients = []
    for part in (slice(20), slice(20, None)):
        hidden.grad = None
        F.cross_entropy(model[2](model[1](hidden[part])), labels[part]).backward()
        gradients.append(hidden.grad[part].double())
    own = torch.cat(gradients)
    torch.testing.assert_close(found["0"].gradients, own.mT @ own, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found["2"].second, (logits.mT @ logits).double().detach(), rtol=1e-4, atol=1e-5)
    assert found["0"].rows == found["2"].rows == 50


def nothing_felt(output: torch.Tensor, target: object) -> torch.Tensor:
    return 0 * output.sum()


@pytest.mark.parametrize("loss", [nothing_felt, F.cross_entropy], ids=["variances", "curvature"])
def test_the_error_of_the_mean_output_is_one(loss):
    model = net()
    error = output_moments(model, ["0"], [(X, torch.arange(50) % 3)], loss, None)["0"].error()
    outputs = model[0](X).detach()
    assert float(error(outputs.mean(0).expand_as(outputs), outputs, None)) == pytest.approx(1, rel=1e-4)
    assert float(error(outputs, outputs, None)) == 0


def test_wide_outputs_are_weighted_by_the_diagonal(monkeypatch):
    model, labels = net(), torch.arange(50) % 3
    whole = output_moments(model, ["0"], [(X, labels)], F.cross_entropy, None)["0"]
    monkeypatch.setattr(module, "WIDE", 4)
    moments = output_moments(model, ["0"], [(X, labels)], F.cross_entropy, None)["0"]
    assert moments.is_wide
    torch.testing.assert_close(moments.gradients, whole.gradients.diagonal())
    outputs = model[0](X).detach()
    assert float(moments.error()(outputs.mean(0).expand_as(outputs), outputs, None)) == pytest.approx(1, rel=1e-4)
    off = (outputs - outputs.mean(0)).square().mean(0).double()
    other = outputs + torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    errors = (other - outputs).square().mean(0).double()
    expected = 0.9 * (moments.gradients @ errors) / (moments.gradients @ off) + 0.1 * (errors / off).mean()
    assert float(moments.error()(other, outputs, None)) == pytest.approx(float(expected), rel=1e-4)


def test_where_nothing_is_felt_it_is_the_mean_over_channels_of_errors_over_variances():
    model = net()
    outputs = model[0](X).detach()
    error = output_moments(model, ["0"], [X], nothing_felt, None)["0"].error()
    other = outputs + torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    expected = ((other - outputs).square().mean(0) / outputs.var(0, correction=0)).mean()
    assert float(error(other, outputs, None)) == pytest.approx(float(expected), rel=1e-4)


def test_nine_tenths_are_the_curvature():
    model, labels = net(), torch.arange(50) % 3
    moments = output_moments(model, ["0"], [(X, labels)], F.cross_entropy, None)["0"]
    outputs = model[0](X).detach()
    other = outputs + torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    covariance = outputs.T.cov(correction=0).double()
    off = (other - outputs).double()
    curved = torch.einsum("ni,ij,nj->", off, moments.gradients, off) / 50 / (moments.gradients * covariance).sum()
    plain = (off.square().mean(0) / covariance.diagonal()).mean()
    assert float(moments.error()(other, outputs, None)) == pytest.approx(float(0.9 * curved + 0.1 * plain), rel=1e-4)


def test_a_channel_that_never_changes_does_not_break_it():
    model = net()
    with torch.no_grad():
        model[0].weight[2] = 0
    error = output_moments(model, ["0"], [X], nothing_felt, None)["0"].error()
    outputs = model[0](X).detach()
    off = torch.zeros(5)
    off[2] = outputs.std(0).mean()
    assert 1 < float(error(outputs + off, outputs, None)) < 1e3
    with torch.no_grad():
        model[0].weight.zero_()
    constant = output_moments(model, ["0"], [X], nothing_felt, None)["0"].error()
    assert float(constant(outputs + 1, outputs, None)) == pytest.approx(5)


def test_rows_that_are_no_data_count_nowhere():
    error = OutputError(-1, torch.eye(2))
    output, expected = torch.ones(2, 3, 2), torch.zeros(2, 3, 2)
    output[0, 1:] = float("nan")
    data = torch.tensor([[True, False, False], [True, True, True]])
    assert float(error(output, expected, data)) == 2


def test_channels_of_images_are_the_second_dimension():
    stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    y = stage(torch.randn(2, 3, 5, 5)).detach()
    assert channel_dim_of(stage, y) == 1
    torch.testing.assert_close(rows_of(y, 1, None), y.permute(0, 2, 3, 1).reshape(-1, 4))
    assert channel_dim_of(nn.Linear(3, 4), torch.zeros(2, 4, 4)) == -1
