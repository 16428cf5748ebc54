"""Projected gradients against galore-torch."""

import pytest
import torch

import lowrank_layers as lr
from benchmarks.peers import has, peer
from lowrank_layers.optim.projectors import svd_projector

from .common import net, same, train


@pytest.mark.skipif(not (has("galore_torch") and has("transformers")), reason="needs galore-torch and transformers")
@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("refresh", [3, 100])
def test_equal_to_galore_torch(refresh, decay, monkeypatch):
    model, other = net(), net()
    for each in (model, other):  # galore-torch takes matrices only
        each[0].weight.requires_grad_(False)
    settings = {"lr": 1e-3, "weight_decay": decay, "eps": 1e-12}
    inner = torch.optim.AdamW(model.parameters(), **settings)
    optimizer = lr.LowRankProjection(inner, rank=4, refresh=refresh, scale=0.25, rotate="none")
    galore = {"rank": 4, "update_proj_gap": refresh, "scale": 0.25, "proj_type": "std"}
    groups = [
        {"params": [p for p in other.parameters() if p.ndim == 1]},
        {"params": [p for p in other.parameters() if p.ndim == 2], **galore},
    ]
    library = peer("galore_torch")
    if refresh < 10:
        # moments are kept from basis to basis, so the signs of singular vectors matter, and each SVD has its own
        def same_signs(self, gradient, rank, type):
            return svd_projector(gradient, rank) if type == "left" else svd_projector(gradient.mT, rank).mT

        monkeypatch.setattr(library.galore_projector.GaLoreProjector, "get_orthogonal_matrix", same_signs)
    train(model, optimizer, 10)
    train(other, library.GaLoreAdamW(groups, no_deprecation_warning=True, **settings), 10)
    # they decay after the step and torch before it: a difference of lr * decay * lr per step
    same(model, other, 1e-6 if decay == 0 else 1e-4)
