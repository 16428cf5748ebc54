"""Tiny decoders of transformers with random weights, whose generation takes milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

SIZE = 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # none stops early; versions before 5.3 need one for prompt lookup
    "eos_token_id": 96,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
WINDOW = {"head_dim": SIZE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EAGER = WINDOW | {"attn_implementation": "eager"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": SIZE}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma": ("Gemma", {"head_dim": SIZE}),
    "gemma2": ("Gemma2", _EAGER),
    "gemma3": ("Gemma3", WINDOW),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gpt2": ("GPT2", {}),
    "gptj": ("GPTJ", {"rotary_dim": 8}),
    "cohere": ("Cohere", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "olmo2": ("Olmo2", {}),
    "cohere2": ("Cohere2", WINDOW),
    "nanochat": ("NanoChat", {}),
    "gpt_oss": ("GptOss", _EAGER | {"num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2", LATENT | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "minicpm3": ("MiniCPM3", LATENT),
    "deepseek_v32": ("DeepseekV32", LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}),
}
"""Beginnings of the names of classes, and sizes."""
ROTATIONS = {
    "llama": (8, False, 0),
    "qwen2": (8, False, 0),
    "qwen3": (8, False, 0),
    "mistral": (8, False, 0),
    "gemma": (8, False, 0),
    "gemma2": (8, False, 0),
    "gemma3": (8, False, 0),
    "phi": (4, False, 0),
    "gpt_neox": (2, False, 0),
    "gpt2": None,
    "cohere": (8, True, 0),
    "gptj": (4, True, 0),
    "gpt_oss": (8, False, 0),
    "deepseek_v2": (4, True, 8),
    "deepseek_v3": (4, False, 8),
}
"""Turned pairs, whether interleaved, and the first turned entry."""


def tiny(kind: str, implementation: str | None = None, **sizes: Any) -> Any:
    """A model in eval mode, with the weights that transformers gives a new one."""
    stem, own = KINDS[kind]
    names = (f"{stem}TextConfig", f"{stem}Config")
    config = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if config is None:
        pytest.skip(f"this version of transformers has no {stem}")
    model = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    torch.manual_seed(0)
    made = getattr(transformers, model)(config(**(SIZES | own | sizes))).eval()
    if implementation is not None:
        made.set_attn_implementation(implementation)
    return made


def peaked(kind: str, **sizes: Any) -> Any:
    """The same with far larger weights, so that attention is not flat, and with biases and norms that matter."""
    model = tiny(kind, **({"eos_token_id": None} | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
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
