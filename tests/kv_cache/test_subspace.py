"""What subspaces are fitted to: scatters of parts and of coefficients are those of all rows."""

import torch

from lowrank_layers.kv_cache.subspace import Scatter


def test_scatters_add_up_to_that_of_all_rows():
    rows = torch.randn(2, 3, 50, 8)
    parts = Scatter.of(rows[:, :, :20]) + Scatter.of(rows[:, :, 20:])
    whole = Scatter.of(rows)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.second, whole.second, atol=1e-4, rtol=1e-4)
    fit = whole.fit(8, torch.float32)
    latent = Scatter.of_coefficients(fit, fit.coefficients(rows))
    torch.testing.assert_close(latent.second, whole.second, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(latent.mean, whole.mean, atol=1e-5, rtol=1e-5)
