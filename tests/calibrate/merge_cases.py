"""Models and batches whose statistics are merged, and the comparison with those of all batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate.example import map_tensors


class Experts(nn.Module):
    """The batch chooses an expert; with the first one the probe has no effect, and the rare layer no rows or graph."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.probe = nn.Linear(6, 6)
        self.rare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, chosen: Tensor, x: Tensor) -> Tensor:
        index = int(chosen.flatten()[0])
        x = self.experts[index](x).relu()
        probed = self.probe(x)
        with torch.set_grad_enabled(index > 0 and torch.is_grad_enabled()):
            x = x + self.rare(x[:, None].expand(-1, 2 * index, -1)).sum(1)
        return self.head(x + probed if index else x)


class Tagger(nn.Module):
    """An embedding, a layer that is called twice, and a convolution over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.twice = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor, data: Tensor) -> Tensor:
        x = self.twice(self.twice(self.embed(ids)).relu())
        return self.head(self.conv(x.mT * data[:, None]).mT)


class Bag(nn.Module):
    """A bag of embeddings whose padding is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(12, 6, padding_idx=0)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def padded(lengths: list[int]) -> dict[str, Tensor]:
    data = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    return {"ids": torch.randint(12, data.shape), "data": data}


def cases() -> dict[str, tuple[nn.Module, list[Any], dict[str, Any]]]:
    """A model, four batches and the options of calibrate, by name."""
    torch.manual_seed(3)
    images = [torch.randn(count, 4, size, size) for count, size in ((5, 6), (2, 6), (3, 8), (4, 5))]
    texts = [padded(lengths) for lengths in ([3, 5], [2, 9, 4], [7], [1, 2])]
    rows = [(0, 3), (1, 4), (0, 2), (2, 6)]
    chosen = [{"chosen": torch.full((count, 1), index), "x": torch.randn(count, 6)} for index, count in rows]
    bags = [torch.randint(12, (count, length)) for count, length in ((3, 4), (2, 7), (5, 3), (1, 2))]
    return {
        "convolutions": (convolutions(), images, {}),
        "padding": (Tagger(), texts, {"mask": "data"}),
        "experts": (Experts(), chosen, {}),
        "bags": (Bag(), bags, {}),
    }


class Energy:
    """A loss without targets or randomness."""

    def __call__(self, output: Tensor, target: Any, mask: Tensor | None = None) -> Tensor:
        each = F.softplus(output).square().sum(-1)
        return each.mean() if mask is None or mask.shape != each.shape else each[mask].mean()


def assert_equal(got: lr.Statistics, want: lr.Statistics, tolerance: float = 1e-12) -> None:
    """The layers in their order, and every field of each."""
    assert list(got) == list(want)
    for key in ("samples", "with_target", "watched", "loss"):
        assert getattr(got, key) == getattr(want, key)
    for name, other in want.items():
        own, ours, theirs = got[name], got[name].inputs, other.inputs
        assert ours.rows == theirs.rows, name
        pairs = [(ours.mean, theirs.mean), (ours.second, theirs.second), (own.gradients, other.gradients)]
        for a, b in pairs:
            assert (a is None) == (b is None), name
            if a is not None:
                assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b), name
        exact = ("input_shape", "rows_per_input", "gradient_rows", "traced", "free_bias")
        assert [getattr(own, key) for key in exact] == [getattr(other, key) for key in exact], name
        for key in ("positions", "repeats"):
            assert abs(getattr(own, key) - getattr(other, key)) <= tolerance * getattr(other, key), (name, key)


def shown(example: object) -> object:
    """The same batch with dtypes and entries in place of tensors, which == compares."""
    return map_tensors(lambda tensor: (tensor.dtype, tensor.tolist()), example)
