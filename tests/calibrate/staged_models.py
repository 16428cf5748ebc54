"""Models whose calibration in stages is compared with that of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr

from .merge_cases import Energy, cases


class Residual(nn.Module):
    """Two convolutions beside a shortcut, changed in place at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x)), inplace=True)).add_(x).relu_()


class UNet(nn.Module):
    """What each level puts out goes down to the next one, and across to its counterpart on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList(Residual(8) for _ in range(2))
        self.up = nn.ModuleList(Residual(8) for _ in range(2))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        across = []
        for level in self.down:
            across.append(level(x))
            x = F.avg_pool2d(across[-1], 2)
        for level in self.up:
            x = F.interpolate(x, scale_factor=2)
            x += across.pop()
            x = level(x)
        return self.head(x).movedim(1, -1)


class Translator(nn.Module):
    """An encoder and a decoder with one embedding, which is called twice per pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = self.transformer(self.embed(source), self.embed(target), src_key_padding_mask=source == 0)
        return self.head(hidden)


class Split(nn.Module):
    """Returns a tuple in a dict, its own input among it, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        return {"pair": (self.one(x) * scale, self.two(x)[:, :6]), "same": x, "size": x.shape}


class Nested(nn.Module):
    """Stages with keyword arguments and nested outputs, a residual in place, and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Split() for _ in range(3))
        self.silent = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            found = block(x, scale=x.sigmoid())
            x = found["pair"][0]
            x += found["same"]
            x = x * found["pair"][1].cos()
            with torch.no_grad():
                x = x + self.silent(x)
        return self.head(x)


class Block(nn.Module):
    """A layer of its own and one that may stand in other blocks too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.own, self.inner = nn.Linear(6, 6), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.own(x).relu())


def shared() -> nn.Module:
    """Three blocks, of which the first and the last have a layer in common."""
    common = nn.Linear(6, 6)
    return nn.Sequential(Block(common), Block(nn.Linear(6, 6)), Block(common), nn.Linear(6, 5))


def linears(depth: int) -> nn.Sequential:
    """An MLP of so many hidden layers."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *hidden, nn.Linear(16, 4))


def resnet() -> nn.Module:
    blocks = [nn.Sequential(Residual(8), Residual(8)), nn.Sequential(Residual(8))]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def llama() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, **sizes))


def t5() -> nn.Module:
    import transformers

    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)
    )


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def texts(side: str = "") -> dict[str, Tensor]:
    return {f"{side}input_ids": torch.randint(3, 60, (3, 5)), f"{side}attention_mask": MASK}


def words(count: int, length: int) -> Tensor:
    return torch.randint(20, (count, length))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (lambda: linears(3), lambda: torch.randn(5, 8).double()),
    "resnet": (resnet, lambda: torch.randn(3, 3, 6, 6).double()),
    "u-net": (UNet, lambda: torch.randn(2, 3, 8, 8).double()),
    "nested": (Nested, lambda: torch.randn(4, 6).double()),
    "shared": (shared, lambda: torch.randn(4, 6).double()),
    "translator": (Translator, lambda: (words(4, 6), words(4, 3))),
    "llama": (llama, texts),
    "t5": (t5, lambda: texts() | texts("decoder_")),
}
"""A model and one of its batches, by name."""


def case(name: str, with_loss: bool) -> tuple[nn.Module, list[Any], Any, dict[str, Any]]:
    """The model in double precision, batches, a new loss, and the options of calibrate.

    Args:
        name: a key of ``MODELS``, or of the cases of merging.
        with_loss: whether there is a loss.
    """
    if name in MODELS:
        torch.manual_seed(5)
        build, batch = MODELS[name]
        batches = [batch() for _ in range(3)]
        if name == "translator" and with_loss:
            batches = [(*inputs, None) for inputs in batches]
        return build().eval().double(), batches, lr.SampledCrossEntropy() if with_loss else None, {}
    model, batches, options = cases()[name]
    return model, batches, Energy() if with_loss else None, options
