"""Llama-shaped models of any size on disk, and what compressing them has to compute and to hold, on paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_layers.files import TensorInfo, write_sharded

SHARD = 500 << 20


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama.

    Args:
        width: the hidden size.
        inner: the size of the feed-forward layers.
        depth: the number of blocks.
        heads: the number of query heads.
        groups: the number of key-value heads.
        vocabulary: the number of tokens that the embedding knows.
    """

    width: int
    inner: int
    depth: int
    heads: int
    groups: int
    vocabulary: int = 32_000

    @property
    def key_width(self) -> int:
        """Entries of all keys of a token."""
        return self.width // self.heads * self.groups

    @property
    def inputs(self) -> list[int]:
        """Sizes of the tensors that the linear layers of a block read; layers that read one share its moments."""
        return [self.width, self.width, self.width, self.inner]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the linear layers of a block."""
        d, k, f = self.width, self.key_width, self.inner
        return [(d, d), (k, d), (k, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def block(self) -> int:
        """Parameters of the linear layers of a block."""
        return sum(m * n for m, n in self.layers)

    @property
    def params(self) -> int:
        """All parameters."""
        return self.depth * (self.block + 2 * self.width) + (2 * self.vocabulary + 1) * self.width

    def config(self) -> dict[str, int]:
        """The arguments of ``LlamaConfig``."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
        }


SHAPES = {
    "smoke": Shape(64, 160, 3, 4, 2, 500),
    "0.3 B": Shape(2048, 5632, 6, 32, 4, 8000),
    "0.6 B": Shape(2048, 5632, 13, 32, 4, 8000),
    "1.1 B": Shape(2048, 5632, 24, 32, 4, 8000),
    "0.3 B, narrow": Shape(1024, 2816, 20, 16, 4),
    "7 B": Shape(4096, 11008, 32, 32, 32),
    "70 B": Shape(8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Work:
    """What the three parts of ``compress_checkpoint`` compute, in floating point operations, and hold, in bytes.

    Args:
        calibrate: forward, recomputation and backward to the activations, and the moments of inputs and gradients.
        plan: roots and spectra of the weighted layers.
        factorize: two forwards, the moments of both models' inputs, and the fits.
        held: activations of all batches at one place, in both models, and the moments and fits of one block.
        disk: moments in fp32 and the finished layers.
    """

    calibrate: float
    plan: float
    factorize: float
    held: float
    disk: float


def work_of(shape: Shape, tokens: int, kept: float = 0.6, entry: int = 2) -> Work:
    """The work on paper.

    A product of ``[m, k]`` and ``[k, n]`` counts ``2 m k n``. A layer of ``m`` outputs and ``n`` inputs takes Cholesky
    factors (``n^3 / 3`` each), products with them, and an eigendecomposition of the smaller Gram matrix (``9 k^3`` with
    vectors, ``4/3 k^3`` without).

    Args:
        shape: the model.
        tokens: how many tokens it is calibrated on.
        kept: the part of the parameters that is kept.
        entry: bytes per entry of activations and weights.
    """
    forward = 2.0 * tokens * (shape.depth * shape.block + shape.vocabulary * shape.width)
    inputs = 2.0 * tokens * shape.depth * sum(n * n for n in shape.inputs)
    gradients = 2.0 * tokens * shape.depth * sum(m * m for m, _ in shape.layers)
    plan = fit = 0.0
    for m, n in shape.layers:
        k = min(m, n)
        plan += (m**3 + n**3) / 3 + 2 * m * n * (m + n) + 4 / 3 * k**3
        fit += (m**3 + 2 * n**3) / 3 + 2 * m * n * (m + 2 * n) + 9 * k**3
    moments = sum(n * n for n in shape.inputs) + sum(m * m for m, _ in shape.layers)
    widest = max(max(m, n) for m, n in shape.layers)
    held = 2 * 4 * tokens * widest * entry + 4 * moments + 6 * 8 * widest**2
    return Work(
        calibrate=3 * forward + inputs + gradients,
        plan=shape.depth * plan,
        factorize=(1 + kept) * forward + 2 * inputs + shape.depth * fit,
        held=held,
        disk=4 * shape.depth * moments + kept * entry * shape.params,
    )


def write_random(folder: Path, shape: Shape) -> None:
    """Writes a folder of transformers with random weights in bfloat16, in shards, one tensor in memory at a time."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(**shape.config(), tie_word_embeddings=False, dtype="bfloat16", use_cache=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    d = shape.width
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, d)}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for block in range(shape.depth):
        for name, size in zip(names, shape.layers, strict=True):
            part = "self_attn" if name in names[:4] else "mlp"
            sizes[f"model.layers.{block}.{part}.{name}.weight"] = size
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{block}.{norm}.weight"] = (d,)
    sizes |= {"model.norm.weight": (d,), "lm_head.weight": (shape.vocabulary, d)}
    infos = {name: TensorInfo(size, torch.bfloat16) for name, size in sizes.items()}
    generator = torch.Generator().manual_seed(0)

    def values(name: str) -> torch.Tensor:
        size = sizes[name]
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return (torch.randn(size, generator=generator) / size[1] ** 0.5).bfloat16()

    write_sharded(folder, infos, values, {}, SHARD)
