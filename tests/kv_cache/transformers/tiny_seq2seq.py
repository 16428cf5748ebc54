"""Tiny encoder-decoders of transformers with random weights, large enough that attention is not flat."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

import lowrank_layers as lr

from .caches import KEEP

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": 96, "bos_token_id": 1, "decoder_start_token_id": 2}
TOKENS |= {"tie_word_embeddings": False}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
}
WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 256,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": 97,
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", TOKENS | T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", TOKENS | T5),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", TOKENS | T5),
    "longt5": ("LongT5Config", "LongT5ForConditionalGeneration", TOKENS | T5 | {"local_radius": 4}),
    "bart": ("BartConfig", "BartForConditionalGeneration", TOKENS | BART),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", TOKENS | BART | WHISPER),
}
"""Name of the configuration, of the model, and sizes; T5Gemma's configuration is two."""
NAMES = [*KINDS, "t5gemma"]


def seq2seq(kind: str, **changes: Any) -> Any:
    """A model in eval mode, whose attentions decide what comes next."""
    torch.manual_seed(0)
    made = (_t5gemma() if kind == "t5gemma" else _made(*KINDS[kind], changes)).eval()
    head = made.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if name.split(".")[-2] in ("o", "o_proj", "out_proj") and parameter.ndim > 1:
                parameter.mul_(4)
    return made


def source(kind: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """What the encoder reads: tokens, or the features of sound."""
    draw = torch.Generator().manual_seed(1)
    if kind == "whisper":
        return {"input_features": torch.randn(rows, 8, 60, generator=draw)}
    return {"input_ids": torch.randint(3, 96, (rows, 30), generator=draw)}


def padded(kind: str) -> dict[str, torch.Tensor]:
    """The same, with the second row's last third hidden."""
    found = source(kind)
    if kind == "whisper":  # its features have no padding that the model looks at
        return found
    mask = torch.ones_like(found["input_ids"])
    mask[1, 20:] = 0
    return {"input_ids": torch.where(mask.bool(), found["input_ids"], 0), "attention_mask": mask}


def exact(kind: str | None, **changes: Any) -> EncoderDecoderCache:
    """Coefficients that hold everything, of the decoder's own tokens and of the encoder's."""
    own, encoder = (lr.LowRankCache(**{"rank": 16, **KEEP, **changes}) for _ in range(2))
    return EncoderDecoderCache(own, DynamicCache() if kind == "t5gemma" else encoder)


def compressed(cache: EncoderDecoderCache) -> bool:
    """Whether every layer of ours has coefficients."""
    both = cache.self_attention_cache, cache.cross_attention_cache
    ours = [each for each in both if isinstance(each, lr.LowRankCache)]
    return all(each.layers and all(layer.compressed > 0 for layer in each.layers) for each in ours)


def twice(make: Any) -> tuple[Any, Any]:
    """Two caches."""
    return make(), make()


def check_it_calls_an_attention(model: nn.Module) -> None:
    """Skips a test of a model that computes with keys and values itself."""
    if not hasattr(sys.modules[type(model).__module__], "eager_attention_forward"):
        pytest.skip("in this version it computes with keys and values itself")


def _made(config: str, network: str, sizes: dict[str, Any], changes: dict[str, Any]) -> Any:
    return getattr(transformers, network)(getattr(transformers, config)(**sizes | changes))


def _t5gemma() -> Any:
    if not hasattr(transformers, "T5GemmaConfig"):
        pytest.skip("this version of transformers has no T5Gemma")
    part = transformers.T5GemmaModuleConfig(**GEMMA)
    config = transformers.T5GemmaConfig(encoder=part, decoder=copy.deepcopy(part), vocab_size=97)
    for name, token in TOKENS.items():
        setattr(config, name, token)
    return transformers.T5GemmaForConditionalGeneration(config)
