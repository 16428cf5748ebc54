"""Models, optimizers and gradients that the tests of projections share."""

from __future__ import annotations

import torch
from torch import nn

import lowrank_layers as lr

METHODS = ("svd", "random", "power")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 10)
    )


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, 6, 6, generator=generator), torch.randint(10, (16,), generator=generator)


def train(model, optimizer, steps, after=lambda: None, start=0):
    for k in range(start, start + steps):
        x, y = data(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()
    return model


def same(first, second, tolerance=0.0):
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def one(shape=(20, 12), dtype=torch.float32, seed=0):
    """A parameter with a gradient."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    p.grad = torch.randn(shape, dtype=dtype)
    return p


def train_and_return(model, **settings):
    optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1e-2), rank=4, refresh=3, **settings)
    train(model, optimizer, 5)
    return optimizer
