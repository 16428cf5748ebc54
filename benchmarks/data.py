"""Data sets and trained weights that tests, examples and benchmarks read; not part of the package.

They are read from the folder that the environment variable ``LOWRANK_DATA`` names, or from ``../shared/data`` beside
the repository.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(os.environ.get("LOWRANK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def available(*names: str) -> bool:
    """Returns whether all these files or folders exist."""
    return all((ROOT / name).exists() for name in names)


def read_idx(path: Path) -> np.ndarray:
    """Reads MNIST's idx format: two zero bytes, a type, the number of dimensions, the dimensions, data."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def mnist(split: str, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """MNIST's images, normalized as usual, and labels; ``split`` is ``"train"`` or ``"test"``."""
    folder = folder or ROOT / "lenet_mnist"
    prefix = {"train": "train", "test": "t10k"}[split]

    def find(stem: str) -> Path:
        found = sorted(folder.glob(f"{prefix}-{stem}-idx*"))
        if not found:
            raise FileNotFoundError(f"{folder}: no file {prefix}-{stem}-idx*-ubyte[.gz]")
        return found[0]

    images = torch.from_numpy(read_idx(find("images")).copy())[:, None]
    labels = torch.from_numpy(read_idx(find("labels")).astype(np.int64))
    return (images.float() / 255 - 0.1307) / 0.3081, labels


def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10's images, normalized for ResNet-20's weights, and labels: 10,000 for testing, 15,000 for training."""
    raw = np.load(ROOT / "cifar_resnet" / f"cifar10_{ {'train': 'train15k', 'test': 'test'}[split] }.npz")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return (torch.from_numpy(raw["x"]).float() / 255 - mean) / std, torch.from_numpy(raw["y"].astype(np.int64))


class LeNet(nn.Module):
    """LeNet for MNIST, 44,426 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 28, 28]`` to ``[N, 10]``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def lenet() -> LeNet:
    """The published trained LeNet, 97.99 % on MNIST's test images."""
    model = LeNet()
    model.load_state_dict(torch.load(ROOT / "lenet_mnist" / "model.pt", weights_only=True, map_location="cpu"))
    return model.eval()


class BasicBlock(nn.Module):
    """Two convolutions and a parameter-free shortcut (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, out, H', W']``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """ResNet for CIFAR-10 (He et al., 2016, section 4.2)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = []
            for k in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, width, 2 if stage > 1 and k == 0 else 1))
                channels = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to ``[N, 10]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20() -> ResNetCifar:
    """The published trained ResNet-20, 91.73 % on CIFAR-10's test images."""
    return resnet(20)


def resnet(depth: int) -> ResNetCifar:
    """A published trained ResNet, of depth 20 (91.73 % on CIFAR-10's test images) or 32 (92.63 %)."""
    path = ROOT / "cifar_resnet" / {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th"}[depth]
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNetCifar(depth)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of correct predictions, in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return 100 * right / len(labels)


def digits() -> Tensor:
    """The 8 x 8 digits of scikit-learn, which need no download: ``[1797, 64]``, 0 to 16."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data).float()


def olivetti_faces() -> Tensor:
    """The Olivetti faces, 400 images of 64 x 64 pixels, one per row: ``[400, 4096]``, 0 to 1."""
    raw = np.load(ROOT / "nmf" / "olivetti_faces.npz")
    return torch.from_numpy(raw["x"].reshape(400, -1)).float() / 255


def newsgroup_counts(terms: int = 2000) -> Tensor:
    """Term counts of 2,000 posts of 20 newsgroups for the most common terms: ``[2000, terms]``, mostly zeros."""
    from sklearn.feature_extraction.text import CountVectorizer

    with gzip.open(ROOT / "nmf" / "mini_newsgroups.jsonl.gz", "rt", encoding="utf-8") as lines:
        posts = [json.loads(line)["text"] for line in lines]
    counts = CountVectorizer(max_features=terms, stop_words="english").fit_transform(posts)
    return torch.from_numpy(counts.toarray()).float()
