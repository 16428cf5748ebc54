"""Two models that hold every factored layer, for the tests that ask whether the rest of torch takes them.

``MODELS`` builds them, with the same values in every process; ``loss_of`` and ``train`` treat both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_layers as lr

from .contracts.tables import LAYERS, LayerRow


class Classifier(nn.Module):
    """Images and words to logits, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 24)
        self.top = nn.Conv2d(24, 24, 3, padding="same", bias=False)
        self.words = nn.Embedding(50, 32, padding_idx=0)
        self.hidden = nn.Linear(24 + 32, 64)
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images - self.mean))
        x = F.relu(self.norm(self.middle(x)))
        return F.relu(self.top(x))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        seen, read = self.features(images).mean((2, 3)), self.words(words).mean(1)
        return self.head(F.relu(self.hidden(torch.cat([seen, read], 1))))

    def sample(self, batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 3, 9, 8), torch.randint(50, (batch, 7))


class EveryLayer(nn.Module):
    """Every row of LAYERS in every smoke variant, in parallel: as many inputs and outputs as layers.

    Args:
        keep: chooses rows and variants.
    """

    def __init__(self, keep: Callable[[LayerRow, str], bool]) -> None:
        super().__init__()
        self.rows = rows_and_variants(keep)
        self.columns = nn.ModuleList(row.fresh(variant) for row, variant in self.rows)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(column(x) for column, x in zip(self.columns, inputs, strict=True))

    def sample(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(row.input(row.dense(variant), batch) for row, variant in self.rows)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "rows"}  # rows hold functions


def rows_and_variants(keep: Callable[[LayerRow, str], bool]) -> list[tuple[LayerRow, str]]:
    return [(row, variant) for row in LAYERS for variant in row.smoke if keep(row, variant)]


def is_pure(row: LayerRow, variant: str) -> bool:
    """Whether forward leaves the weights alone; an embedding with ``max_norm`` renormalizes rows that it looks up."""
    return row.variants[variant].get("max_norm") is None


def dense_classifier(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier()


def factored_classifier(seed: int = 0) -> Classifier:
    """Every layer of the dense one replaced, by each of the methods."""
    model = dense_classifier(seed)
    plan = lr.make_plan(model, rank=6)
    plan.set_rank("middle", (8, 8), method="tucker").set_rank("top", 12, method="cp")
    return lr.factorize_(model, plan)


def every_layer(seed: int = 0) -> EveryLayer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EveryLayer(is_pure)


MODELS = {"classifier": factored_classifier, "every layer": every_layer}


def batch_of(model: nn.Module, size: int, seed: int = 0) -> tuple[Tensor, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.sample(size)


def outputs_of(model: nn.Module, inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    out = model(*inputs)
    return out if isinstance(out, tuple) else (out,)


def loss_of(model: nn.Module, inputs: Iterable[Tensor]) -> Tensor:
    """A mean over the batch, so that the losses of two halves average to that of the whole."""
    return torch.stack([(out.float() - 0.3).square().mean() for out in outputs_of(model, inputs)]).sum()


def train(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], rate: float = 0.01) -> list[float]:
    """Takes one step of SGD with momentum per batch, and returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for inputs in batches:
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
