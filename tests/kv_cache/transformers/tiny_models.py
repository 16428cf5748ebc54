"""Tiny decoders of transformers with random weights, biases and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ..tiny import LATENT, SIZES

SIZE = 16
_MLA = LATENT | {"v_head_dim": 12}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": SIZE}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"head_dim": SIZE, "sliding_window": 8, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", {"head_dim": SIZE, "sliding_window": 8}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "cohere": ("Cohere", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_oss": (
        "GptOss",
        {"head_dim": SIZE, "num_local_experts": 4, "sliding_window": 8, "attn_implementation": "eager"},
    ),
    "gpt2": ("GPT2", {}),
    "olmo2": ("Olmo2", {}),
    "deepseek_v2": ("DeepseekV2", _MLA | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3", _MLA),
    "minicpm3": ("MiniCPM3", _MLA),
    "deepseek_v32": ("DeepseekV32", _MLA | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}),
}


def tiny(kind: str, **settings: Any) -> nn.Module:
    """A model in eval mode."""
    stem, own = KINDS[kind]
    names = (f"{stem}TextConfig", f"{stem}Config")
    config = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if config is None:
        pytest.skip(f"this version of transformers has no {stem}")
    model_name = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_name)(
        config(**(SIZES | {"eos_token_id": None} | own | settings))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # weights far larger than their start, so that attention is not flat, and biases and norms that matter
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Token indices and mask of two rows, the first padded on the left."""
    ids = torch.randint(3, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Those of real tokens."""
    with torch.no_grad():
        found: Tensor = model(ids, attention_mask=mask).logits[mask.bool()]
    return found


def generated(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Without drawing."""
    found: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings
    )
    return found


def cached(model: Any, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What an ordinary cache holds after the prompt, layer by layer."""
    with torch.no_grad():
        past = model(ids, attention_mask=mask, past_key_values=transformers.DynamicCache(), use_cache=True)
    return [(layer.keys, layer.values) for layer in past.past_key_values.layers]
