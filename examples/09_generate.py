"""Lesson 9: generate text with the exact and with a low-rank key/value cache, side by side.

python examples/09_generate.py [--model DIR] [--text FILE] [--prompt 768] [--tokens 128] [--out DIR]

Prints both texts, tokens per second, bytes and the first token that differs, and plots perplexity against bytes. The
model is a small Llama trained on Python code, the prompt is code that it was not trained on; both are read from
../shared/data unless others are given. Needs the extras transformers and plot.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from course import begin, lesson, save
from language_model import DATA, load
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_layers as lr
from lowrank_layers import plot

RECENT, STEP = 32, 8
RANKS = (8, 10, 12, 16, 24, 32)


def small_cache(rank: int) -> Any:
    """A cache with one subspace per layer for all heads of the keys, one for the values, and int8 coefficients."""
    return lr.LowRankCache(rank=rank, keep_recent=RECENT, keep_first=1, block=STEP, dtype=torch.int8)


def nbytes(cache: Any) -> int:
    """Bytes of any cache."""
    if isinstance(cache, lr.LowRankCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, count: int, cache: Any) -> tuple[list[int], float, int]:
    """Greedy tokens, tokens per second, and the bytes of the cache at the end."""
    start = time.perf_counter()
    out = model.generate(
        prompt, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, prompt.shape[1] :].tolist(), count / (time.perf_counter() - start), nbytes(cache)


@torch.no_grad()
def perplexity(model: nn.Module, window: Tensor, prompt: int, cache: Any) -> float:
    """Perplexity of the text after the prompt, a few tokens per step, so that tokens are compressed as they age."""
    model(window[:, :prompt], past_key_values=cache)
    found = []
    for at in range(prompt, window.shape[1] - 1, STEP):
        step = window[:, at : min(at + STEP, window.shape[1] - 1)]
        found.append(model(step, past_key_values=cache).logits.float().log_softmax(-1))
    return math.exp(-float(torch.cat(found, 1).gather(-1, window[:, prompt + 1 :, None]).mean()))


def main() -> None:
    parser = lesson(__doc__)
    parser.add_argument("--model", type=Path, default=DATA / "pycode_llama")
    parser.add_argument("--text", type=Path, default=DATA / "pycode_llama" / "valid.txt")
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4, help="windows of text for the plot")
    args = parser.parse_args()
    begin(args)
    from transformers import DynamicCache

    model, tokenizer = load(args.model, torch.bfloat16)
    model.eval()
    tokens = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")).ids)
    prompt = tokens[None, : args.prompt]

    exact, exact_speed, whole = generate(model, prompt, args.tokens, cache := DynamicCache())
    cache = small_cache(args.rank)
    model.set_attn_implementation("lowrank")
    small, small_speed, part = generate(model, prompt, args.tokens, cache)
    differs = next((k for k, pair in enumerate(zip(exact, small, strict=True)) if pair[0] != pair[1]), None)
    print(f"--- exact\n{tokenizer.decode(exact)}\n\n--- rank {args.rank} of {model.config.head_dim}, int8")
    print(f"{tokenizer.decode(small)}\n")
    print(f"{'':12}{'tokens/s':>10}{'cache, KiB':>12}")
    print(f"{'exact':12}{exact_speed:>10.1f}{whole / 1024:>12.1f}")
    print(f"{'low rank':12}{small_speed:>10.1f}{part / 1024:>12.1f}   {whole / part:.2f} times fewer bytes")
    print(f"first token that differs: {'none' if differs is None else f'{differs} of {args.tokens}'}")

    length = min(args.prompt + 256, model.config.max_position_embeddings)
    starts = [k * (len(tokens) - length) // args.windows for k in range(args.windows)]
    windows = [tokens[None, start : start + length] for start in starts]
    points: dict[str, list[tuple[int, float]]] = {"exact": [], "low rank, int8": []}
    for rank in tqdm((None, *RANKS), desc="perplexity"):
        found = []
        for window in windows:
            cache = DynamicCache() if rank is None else small_cache(rank)
            model.set_attn_implementation("sdpa" if rank is None else "lowrank")
            found.append(perplexity(model, window, args.prompt, cache))
        points["exact" if rank is None else "low rank, int8"].append((nbytes(cache), sum(found) / len(found)))
    for label, each in points.items():
        print(f"{label:16}" + "  ".join(f"{size / 1024:,.0f} KiB: {value:.2f}" for size, value in each))
    print()
    save(plot.perplexity_against_bytes(points), args.out / "09_generate.png")


if __name__ == "__main__":
    main()
