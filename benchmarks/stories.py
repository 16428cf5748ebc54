"""The smallest of Karpathy's TinyStories models (260 thousand weights) as a Llama of transformers."""

from __future__ import annotations

import itertools
import re
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import ROOT

NAMES = {
    "input_layernorm": ("layers", "dim"),
    "self_attn.q_proj": ("layers", "dim", "dim"),
    "self_attn.k_proj": ("layers", "kv", "dim"),
    "self_attn.v_proj": ("layers", "kv", "dim"),
    "self_attn.o_proj": ("layers", "dim", "dim"),
    "post_attention_layernorm": ("layers", "dim"),
    "mlp.gate_proj": ("layers", "hidden", "dim"),
    "mlp.down_proj": ("layers", "dim", "hidden"),
    "mlp.up_proj": ("layers", "hidden", "dim"),
}
"""The order of the weights in the file, after the embedding."""


def stories_model() -> Any:
    """A ``LlamaForCausalLM`` with the weights of llama2.c's file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = (ROOT / "stories260K" / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    sizes = {"dim": dim, "hidden": hidden, "layers": layers, "kv": dim // heads * kv_heads}
    numbers = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())

    def take(*shape: int) -> Tensor:
        nonlocal numbers
        count = int(np.prod(shape))
        part, numbers = numbers[:count].view(shape), numbers[count:]
        return part

    weights = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, shape in NAMES.items():
        stack = take(*(sizes[size] for size in shape))
        if name.endswith(("q_proj", "k_proj")):
            # pairs (2j, 2j + 1) become (j, j + half), as transformers turns them
            stack = stack.unflatten(1, (-1, dim // heads // 2, 2)).transpose(2, 3).reshape(stack.shape)
        weights |= {f"model.layers.{k}.{name}.weight": weight for k, weight in enumerate(stack)}
    weights["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def stories_tokens(count: int) -> Tensor:
    """``count`` tokens of stories that the model was not trained on, each story after a start token."""
    scores = vocabulary()
    index = {word: k for k, (word, _) in enumerate(scores)}
    text = (ROOT / "text" / "tinystories_v2_valid_slice.txt").read_text(encoding="utf-8")
    known: dict[str, list[int]] = {}
    found: list[int] = []
    for story in re.split(r"\n+(?=Once upon a time|One day)", text):
        found.append(1)
        for word in re.findall(r"\s\S*", " " + story.strip()):  # no piece of the vocabulary spans two words
            if word not in known:
                known[word] = encoded(word, scores, index)
            found += known[word]
        if len(found) >= count:
            break
    return torch.tensor(found[:count])


def vocabulary() -> list[tuple[bytes, float]]:
    """The words of the vocabulary and their scores, in order."""
    raw = (ROOT / "stories260K" / "tok512.bin").read_bytes()
    at, found = 4, []
    while at < len(raw):
        score, size = struct.unpack("fi", raw[at : at + 8])
        found.append((raw[at + 8 : at + 8 + size], score))
        at += 8 + size
    return found


def encoded(text: str, scores: list[tuple[bytes, float]], index: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding: merges the pair with the best score until there is none; unknown letters become bytes."""
    found: list[int] = []
    for letter in text:
        own = letter.encode()
        found += [index[own]] if own in index else [byte + 3 for byte in own]
    while True:
        pairs = [index.get(scores[a][0] + scores[b][0]) for a, b in itertools.pairwise(found)]
        known = [(scores[pair][1], -k, pair) for k, pair in enumerate(pairs) if pair is not None]
        if not known:
            return found
        _, place, pair = max(known)
        found[-place : -place + 2] = [pair]
