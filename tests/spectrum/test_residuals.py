"""Residuals equal what numpy computes of the difference."""

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_layers as lr


def test_numbers_equal_numpy():
    weight = torch.randn(30, 50)
    factors = lr.svd(weight, 7)
    report = lr.residual_report(weight, factors)
    dense = weight.double().numpy()
    error = dense - factors.to_dense().double().numpy()
    s = np.linalg.svd(dense, compute_uv=False)
    assert report.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(dense), rel=1e-5)
    assert report.best_error == pytest.approx(np.linalg.norm(s[7:]) / np.linalg.norm(s), rel=1e-5)
    assert report.relative_error == pytest.approx(report.best_error, rel=1e-5)
    assert report.spectral_error == pytest.approx(s[7] / s[0], rel=1e-5)
    assert report.largest == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert report.mean == pytest.approx(error.mean(), rel=1e-5)
    assert report.explained == pytest.approx((s[:7] ** 2).sum() / (s**2).sum(), rel=1e-5)
    assert report.residual.values[0].item() == pytest.approx(s[7], rel=1e-5)
    assert (report.rank, report.dense, report.stored) == (7, 1500, 7 * 81)
    assert "least of rank 7" in str(report)


def test_worse_factors_are_above_the_bound():
    weight = torch.randn(30, 50)
    worse = lr.svd(weight + 0.3 * torch.randn(30, 50), 7)
    report = lr.residual_report(weight, worse)
    assert report.rank == 7
    assert report.relative_error > 1.01 * report.best_error


def test_layers_kernels_and_plain_tensors():
    dense = nn.Conv2d(8, 16, 3)
    layer = lr.TuckerConv2d.from_dense(dense, rank=(4, 4))
    expected = ((dense.weight - layer.weight).norm() / dense.weight.norm()).item()
    report = lr.residual_report(dense.weight, layer)
    assert report.relative_error == pytest.approx(expected, rel=1e-5)
    assert report.stored == layer.factors().numel()
    plain = lr.residual_report(dense.weight, layer.weight)
    assert plain.stored is None
    assert plain.relative_error == pytest.approx(expected, rel=1e-5)


def test_residual_of_noise_has_the_stable_rank_of_noise():
    weight = torch.randn(200, 1) @ torch.randn(1, 300) + torch.randn(200, 300)
    report = lr.residual_report(weight, lr.svd(weight, 1))
    noise = 200 * 300 / (200**0.5 + 300**0.5) ** 2
    assert report.residual.stable_rank == pytest.approx(noise, rel=0.1)
    assert lr.residual_report(weight, torch.zeros(200, 300)).residual.stable_rank < 0.1 * noise


def test_refuses_another_shape():
    with pytest.raises(lr.LowRankError, match="expected that of the dense tensor"):
        lr.residual_report(torch.randn(4, 5), lr.svd(torch.randn(5, 4), 2))
