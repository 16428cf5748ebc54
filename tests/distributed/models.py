"""Models that the tests of gradients between processes train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr


class Net(nn.Module):
    """Several matrices; some steps may leave the branch out."""

    def __init__(self, inputs: int = 32) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(inputs, 48), nn.Linear(48, 48), nn.Linear(48, 8)
        self.branch = nn.Linear(48, 48)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.first(x).relu()
        x = self.middle(x).relu() + (self.branch(x) if branch else 0)
        out: Tensor = self.last(x)
        return out


class Checkpointed(Net):
    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.first(x).relu()
        x = checkpoint(lambda x: self.middle(x).relu() + self.branch(x), x, use_reentrant=False)
        out: Tensor = self.last(x)
        return out


class Scaled(Net):
    """With a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        return super().forward(x, branch) * self.scale


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.words((x.abs() * 9).long().clamp(max=39)).mean(1))
        return out


class SparseWords(nn.Module):
    """Sparse gradients in first and last place, dense ones between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32, sparse=True)
        self.pairs = lr.LowRankEmbedding(40, 32, sparse=True, rank=5)
        self.middle, self.head = lr.LowRankLinear(32, 32, rank=16), nn.Linear(32, 8)
        self.bag = nn.EmbeddingBag(40, 8, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        index = (x.abs() * 9).long().clamp(max=39)
        out: Tensor = self.head(self.middle((self.words(index) + self.pairs(index)).mean(1)).relu())
        return out + self.bag(index) / 32


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(64, 8)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.head(self.conv(x).relu().flatten(1))
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(3, 32, 40) / 6), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.einsum("bi,eij->bj", x, self.experts).relu())
        return out
