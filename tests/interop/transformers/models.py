"""Tiny models of transformers with random weights, one per kind of architecture, as configuration and input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lowrank_layers as lr

WORDS = 97
_DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2, 18).reshape(2, 8)}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()}


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Args:
        stem: beginning of the names of its classes.
        head: end of the name of the class of the model.
        auto: the class that loads it by its ``config.json``.
        sizes: arguments of the configuration.
        inputs: keyword arguments of its forward.
    """

    stem: str
    head: str
    auto: str
    sizes: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = tokens

    def dense(self) -> Any:
        """A new dense model, the same every time."""
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.stem}Config")(**self.sizes)
        return getattr(transformers, self.stem + self.head)(config).eval()

    def factored(self) -> Any:
        """The dense model with 60 % of the parameters in its layers."""
        model = self.dense()
        return lr.factorize_(model, lr.make_plan(model, lr.Budget(params=0.6, of="planned")))

    def load(self, folder: Any, **options: Any) -> Any:
        """The model in a folder."""
        return getattr(transformers, self.auto).from_pretrained(folder, **options)


KINDS = {
    "llama": Kind("Llama", "ForCausalLM", "AutoModelForCausalLM", _DECODER),
    "tied llama": Kind("Llama", "ForCausalLM", "AutoModelForCausalLM", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3 moe": Kind(
        "Qwen3Moe",
        "ForCausalLM",
        "AutoModelForCausalLM",
        {**_DECODER, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "gpt2": Kind(
        "GPT2",
        "LMHeadModel",
        "AutoModelForCausalLM",
        {
            "vocab_size": WORDS,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 96,
        },
    ),
    "t5": Kind(
        "T5",
        "ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        {
            "vocab_size": WORDS,
            "d_model": 64,
            "d_ff": 96,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        lambda: {**tokens(), "decoder_input_ids": torch.arange(1, 9).reshape(2, 4)},
    ),
    "vit": Kind(
        "ViT",
        "ForImageClassification",
        "AutoModelForImageClassification",
        {**_ENCODER, "image_size": 32, "patch_size": 8, "num_labels": 10},
        pictures,
    ),
    "bert": Kind("Bert", "Model", "AutoModel", {**_ENCODER, "vocab_size": WORDS, "max_position_embeddings": 64}),
}


def narrow(kind: Kind) -> nn.Module:
    """The model with fewer hidden units, another number in each block, and ordinary layers."""
    model = kind.dense()
    stats = lr.calibrate(model, [kind.inputs()])
    plan = lr.make_plan(model, lr.Budget(params=0.9), stats, [lr.HiddenUnitsMethod()])
    for block, leader in enumerate(dict.fromkeys(entry.settings["consumer"] for entry in plan if entry.is_grouped)):
        plan.set_rank(leader, 41 + 6 * block)
    return lr.factorize_(model, plan, stats)


def narrow_pairs(kind: Kind) -> nn.Module:
    """The model with fewer hidden units, and pairs in the place of some of these and of other layers."""
    model = narrow(kind)
    return lr.factorize_(model, lr.make_plan(model, rank=9, skip=["gate_proj"]))


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states of a model without a head."""
    return model(**inputs)[0]
