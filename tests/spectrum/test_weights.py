"""Spectra of weights equal numpy's and scipy's, layer by layer."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import lowrank_layers as lr


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.linear = nn.Linear(12, 20)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.norm = nn.LayerNorm(20)
        self.attention = nn.MultiheadAttention(12, 2)
        self.factored = lr.LowRankLinear(24, 16, rank=3)


def matrices(model):
    """The matrices of the layers, written out in numpy."""
    arrays = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    kernel = arrays["grouped.weight"].reshape(2, 6, 12)
    grouped = np.block([[kernel[0], np.zeros((6, 12))], [np.zeros((6, 12)), kernel[1]]])
    up = arrays["up.weight"].transpose(1, 2, 3, 0).reshape(24, 4)
    q, k, v = np.split(arrays["attention.in_proj_weight"], 3)
    return {
        "embedding": arrays["embedding.weight"].T,
        "linear": arrays["linear.weight"],
        "conv": arrays["conv.weight"].reshape(6, 36),
        "grouped": grouped,
        "up": up,
        "attention.q_proj": q,
        "attention.k_proj": k,
        "attention.v_proj": v,
        "attention.out_proj": arrays["attention.out_proj.weight"],
        "factored": model.factored.weight.detach().double().numpy(),
    }


def test_every_number_equals_numpy():
    model = Mixed()
    expected = matrices(model)
    found = lr.weight_spectrum(model)
    assert [layer.name for layer in found] == list(expected)
    for name, matrix in expected.items():
        raw = found[name].raw
        s = np.linalg.svd(matrix, compute_uv=False)
        close = lambda value: pytest.approx(value, rel=1e-5, abs=1e-12)  # noqa: E731
        assert raw.shape == matrix.shape
        assert raw.values.numpy() == pytest.approx(s, rel=1e-5, abs=1e-6)
        assert raw.spectral_norm == close(np.linalg.norm(matrix, 2))
        assert raw.nuclear_norm == pytest.approx(np.linalg.norm(matrix, "nuc"), rel=1e-5)
        assert raw.frobenius_norm == close(np.linalg.norm(matrix))
        if name != "factored":
            assert raw.condition_number == close(np.linalg.cond(matrix))
        assert raw.stable_rank == close(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
        assert raw.effective_rank == pytest.approx(np.exp(scipy.stats.entropy(s / s.sum())), rel=1e-5)
        assert raw.participation_ratio == close((s**2).sum() ** 2 / (s**4).sum())
        energy = (s**2).cumsum() / (s**2).sum()
        assert raw.cumulative_energy.numpy() == pytest.approx(energy, rel=1e-5)
        for fraction in (0.9, 0.95, 0.99):
            assert raw.rank_for_energy(fraction) == np.searchsorted(energy, fraction) + 1
            assert raw.error_at(2) == close(np.sqrt((s[2:] ** 2).sum() / (s**2).sum()))


def test_ranks_and_exponent_are_those_of_the_rules():
    weight = torch.randn(60, 90) * 0.1
    weight[:3, :3] += 20 * torch.eye(3)
    layer = nn.Linear(90, 60)
    layer.weight.data = weight
    raw = lr.weight_spectrum(nn.Sequential(layer))["0"].raw
    assert (raw.gavish_donoho_rank, raw.evbmf_rank) == (3, 3)
    law = lr.fit_power_law(torch.linalg.svdvals(weight.double()).square())
    assert raw.power_law.alpha == pytest.approx(law.alpha, rel=1e-6)


def test_weighted_values_are_those_of_the_roots():
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))
    stats = lr.calibrate(model, [torch.randn(200, 12)], loss=lr.SampledCrossEntropy())
    damping = lr.Damping(inputs=0.01, outputs=0.2)
    found = lr.weight_spectrum(model, stats, damping=damping)
    for name in ("0", "2"):
        known = stats[name]
        covariance, gradients = known.inputs.covariance().numpy(), known.gradients.numpy()
        covariance = covariance + 0.01 * covariance.diagonal().mean() * np.eye(len(covariance))
        gradients = gradients + 0.2 * gradients.diagonal().mean() * np.eye(len(gradients))
        weight = model.get_submodule(name).weight.detach().double().numpy()
        weighted = scipy.linalg.sqrtm(gradients) @ weight @ scipy.linalg.sqrtm(covariance)
        expected = np.linalg.svd(weighted.real, compute_uv=False)
        assert found[name].weighted.values.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-5 * expected[0])
    assert "weighted by inputs and gradients" in str(found)


def test_target_and_the_model_stay_as_they_are():
    model = Mixed()
    before = list(model.state_dict())
    assert [layer.name for layer in lr.weight_spectrum(model, target=[nn.Conv2d, "linear"])] == ["linear", "conv"]
    assert list(model.state_dict()) == before
    with pytest.raises(lr.LowRankError, match="matches no module"):
        lr.weight_spectrum(model, target=["nothing"])


def test_computed_weights_are_those_that_the_layer_uses():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    adapted = lr.add_lora_(nn.Sequential(nn.Linear(6, 5)), rank=2, init="gaussian")
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter))
    for model in (normed, adapted):
        (layer,) = lr.weight_spectrum(model)
        expected = torch.linalg.svdvals(model[0].weight.detach().double())
        torch.testing.assert_close(layer.raw.values, expected, rtol=1e-5, atol=1e-6)


def test_zeros():
    raw = lr.MatrixSpectrum.of(torch.zeros(4, 6))
    assert (raw.stable_rank, raw.effective_rank, raw.participation_ratio, raw.power_law) == (0, 0, 0, None)
    assert math.isinf(raw.condition_number)
    assert not raw.cumulative_energy.isnan().any()


def test_scale_does_not_matter_to_ranks():
    weight = torch.randn(10, 20, dtype=torch.float64)
    small, large = (lr.MatrixSpectrum.of(weight * scale) for scale in (2.0**-600, 2.0**600))
    for name in ("stable_rank", "effective_rank", "participation_ratio", "gavish_donoho_rank", "evbmf_rank"):
        assert getattr(small, name) == getattr(large, name)


def test_refuses():
    with pytest.raises(lr.LowRankError, match="no linear layer"):
        lr.weight_spectrum(nn.Sequential(nn.ReLU()))
    with pytest.raises(lr.LowRankError, match=r"expected a torch\.nn\.Module"):
        lr.weight_spectrum(torch.randn(3, 3))
    broken = nn.Sequential(nn.Linear(3, 3))
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(lr.LowRankError, match=r"'0': .*NaN or Inf"):
        lr.weight_spectrum(broken)
    with pytest.raises(lr.LowRankError, match="no layer '7'"):
        lr.weight_spectrum(nn.Sequential(nn.Linear(3, 3)))["7"]


def test_table_has_one_line_per_layer():
    lines = str(lr.weight_spectrum(nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5)))).splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:2] == ["0", "40x30"]
