"""Small random models of transformers, whose generation takes milliseconds."""

import torch
import transformers

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
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
WINDOW = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", WINDOW),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", WINDOW),
    "phi": ("PhiConfig", "PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.25}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"rotary_dim": 8}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", LATENT | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", LATENT),
}
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


def model(kind, implementation=None, **changes):
    config, network, extra = KINDS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, network)(getattr(transformers, config)(**{**SIZES, **extra, **changes})).eval()
    if implementation is not None:
        made.set_attn_implementation(implementation)
    return made
