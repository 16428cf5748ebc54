"""A network that was trained on scikit-learn's digits, and what it looks like factorized."""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lowrank_layers as lr


def batches(start: int, stop: int, size: int = 100) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[start:stop] / 16, torch.tensor(data.target)[start:stop]
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def cnn() -> nn.Module:
    body = [nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    body += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32 * 16, 10))


def trained(model: nn.Module, steps: int = 150) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = batches(0, 1200)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def factorized(dense: nn.Module, kept: float) -> nn.Module:
    model = copy.deepcopy(dense)
    return lr.factorize_(model, lr.make_plan(model, lr.Budget(params=kept), methods=[lr.SVDMethod()]))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> float:
    return float((output.argmax(-1) == target).float().mean())
