"""A Llama of transformers as a file of GGUF, which llama.cpp reads; written by the package gguf.

GGUF has no low-rank layers. A model that ``remove_units_(uniform=True)`` made smaller has none either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lowrank_layers as lr
from lowrank_layers.files import replacing


def write_gguf(model: Any, path: Path, *, like: Path | None = None) -> Path:
    """Writes the weights in fp32.

    Args:
        model: a ``LlamaForCausalLM`` with plain layers.
        path: the file.
        like: a GGUF file of the same vocabulary, whose tokenizer is copied.

    Raises:
        LowRankError: for a model of another class, with low-rank layers, or with scaled rotations.
    """
    import gguf

    config = model.config
    low_rank = [name for name, module in model.named_modules() if isinstance(module, lr.FactoredModule)]
    if config.model_type != "llama" or low_rank or config.rope_parameters.get("rope_type", "default") != "default":
        raise lr.LowRankError(
            f"write_gguf: got a {type(model).__name__} with {len(low_rank)} low-rank layers and the rotations"
            f" {config.rope_parameters}, expected a LlamaForCausalLM with plain layers and rotations; use densify_."
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(stem.split(".")[-1])
        values = tensor.float().numpy()
        if not (config.tie_word_embeddings and stem == "lm_head"):
            tensors[f"{names.get_name(stem)}.{suffix}"] = values if heads is None else interleaved(values, heads)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name(path.stem)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        if like is not None:
            for key, field in gguf.GGUFReader(like).fields.items():
                if key.startswith("tokenizer."):
                    writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in llama.cpp's order, where the two numbers that are rotated together are neighbours.

    transformers rotates number ``i`` of a head's first half with number ``i`` of its second half.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
