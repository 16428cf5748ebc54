"""What lessons on handwritten digits share: the pictures, a small CNN, its training and its accuracy."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 1,347 to train on, 450 to test, each as images and labels."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    return x[train], y[train], x[test], y[test]


def mnist(folder: Path | None) -> Data:
    """MNIST, read from its own idx files, gzipped or not, in a folder or in ../shared/data."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.data import mnist as read

    return *read("train", folder), *read("test", folder)


def build(size: int = 8) -> nn.Module:
    """A CNN for images of ``size`` x ``size`` pixels."""
    side = size // 4
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(64 * side * side, 128),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(128, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    label: str = "train",
) -> list[float]:
    """Trains with a learning rate that falls to zero, by default AdamW's, and returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3) if optimizer is None else optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(x)).split(64)]
    losses: list[float] = []
    for batch in tqdm(batches, desc=label):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - len(losses) / len(batches))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of images that are read correctly."""
    batches = zip(x.split(500), y.split(500), strict=True)
    return 100 * sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches) / len(x)
