"""Time of one decoding step of one layer with a low-rank key/value cache, beside SDPA on dense keys and values."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, paired, write_result

QUERY_HEADS, HEADS, SIZE = 32, 8, 128
LENGTHS, SMOKE = (2048, 8192, 32768), (512,)
AFTER = {"rope": "after", "joint": False}
"""The fast setting: attention entirely in the subspace of each head."""
CACHES = {
    "r = 16": {"rank": 16, **AFTER},
    "r = 32": {"rank": 32, **AFTER},
    "r = 64": {"rank": 64, **AFTER},
    "r = 32, int8": {"rank": 32, "dtype": torch.int8, **AFTER},
    "r = 16, heads joint": {"rank": 16, "rope": "after", "joint": True},
    "r = 16, RoPE taken off": {"rank": 16, "rope": "before", "joint": False},
    "r = 16, RoPE taken off, heads joint, int8": {"rank": 16, "rope": "before", "joint": True, "dtype": torch.int8},
    "r = 16, RoPE by tiles": {"rank": 16, "rope": "tile", "joint": False},
    "r = 16, RoPE by tiles, heads joint, int8": {"rank": 16, "rope": "tile", "joint": True, "dtype": torch.int8},
    "3 bits (the default)": {"bits": 3, "keep_recent": 128},
    "3 bits, heads joint": {"bits": 3, "keep_recent": 128, "joint": True},
}
MODELS = {
    "7B-like (14 GB of weights, 32 layers, 8 heads of 128, bfloat16)": (14e9, 32 * 2 * 8 * 128 * 2, 131072),
    "pycode_llama (5.5 M weights, 6 layers, 2 heads of 64, fp32)": (5.5e6 * 4, 6 * 2 * 2 * 64 * 4, 1024),
}
"""Bytes of the weights and per token in the cache, and the longest context that is listed."""


def tokens(count: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 1, HEADS, count, SIZE)
    return keys, values


def filled(keys: Tensor, values: Tensor, **settings: object) -> lr.LowRankKV:
    cache = lr.LowRankKV(lr.KVSettings(refresh=None, **settings), lr.Rotation.of(SIZE))  # type: ignore[arg-type]
    cache.append(keys, values)
    cache.compress()
    return cache


def rebuilt(cache: lr.LowRankKV, rows: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(rows, *cache.dense())


@torch.no_grad()
def step_rows(count: int, args: argparse.Namespace) -> list[list[object]]:
    """Times of each setting in turn with the fastest dense one, so that neither finds its data in CPU caches."""
    keys, values = tokens(count)
    query = torch.randn(1, QUERY_HEADS, 1, SIZE)
    grouped = query.view(1, HEADS, -1, SIZE)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(grouped, keys, values)

    def gqa() -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    seconds, ratios = paired([dense, gqa], args.rounds)
    fastest = min(1.0, ratios[1])  # in units of the grouped one
    rows: list[list[object]] = [
        [count, "dense, a group's queries as rows", f"{1e3 * seconds[0]:.2f}", f"{fastest:.2f}", "1.00", ""],
        [count, "dense, enable_gqa", f"{1e3 * seconds[1]:.2f}", f"{fastest / ratios[1]:.2f}", "1.00", ""],
    ]
    for label, settings in CACHES.items():
        cache = filled(keys, values, **settings)
        ways: dict[str, Callable[[], Tensor]] = {label: partial(cache.attend, query)}
        if label == "r = 32":
            ways[f"{label}, rebuilt, then SDPA"] = partial(rebuilt, cache, grouped)
        saved = (keys.nbytes + values.nbytes) / cache.nbytes()
        for name, way in ways.items():
            seconds, ratios = paired([dense, way], args.rounds)
            faster = fastest / ratios[1]
            cells = [f"{1e3 * seconds[1]:.2f}", f"{faster:.2f}", f"{saved:.2f}", f"{faster / saved:.0%}"]
            rows.append([count, name, *cells])
    return rows


def bound_rows(args: argparse.Namespace) -> list[list[object]]:
    """An upper bound on the speed-up of a whole step, which reads the weights once and the cache of each sequence."""
    rows: list[list[object]] = []
    for model, (weights, token, longest) in MODELS.items():
        for count in SMOKE if args.smoke else (1024, *LENGTHS):
            if count > longest:
                continue
            for batch in (1, 32):
                cells: list[object] = []
                for rank in (16, 32):
                    cache = filled(*tokens(count), rank=rank, **AFTER)
                    left = cache.nbytes() / (2 * 4 * HEADS * count * SIZE)
                    held = batch * count * token
                    cells.append(f"{(weights + held) / (weights + held * left):.2f}")
                rows.append([model, count, batch, *cells])
    return rows


@torch.no_grad()
def cost_rows(count: int, args: argparse.Namespace) -> list[list[object]]:
    """CPU milliseconds of the first fit, and of a block of 64 tokens with and without fitting again."""
    rows: list[list[object]] = []
    for label, settings in CACHES.items():
        if settings.get("rank") == 64:
            continue
        cells, cache = [], lr.LowRankKV(lr.KVSettings(), None)
        first = []
        keys, values = tokens(count)
        for _ in range(1 if args.smoke else 3):
            start = time.process_time()
            cache = filled(keys, values, **settings)
            first.append(time.process_time() - start)
        cells.append(f"{1e3 * statistics.median(first):.1f}")
        for refresh in (None, 1.0):
            grown, taken = copy.deepcopy(cache), []
            grown.settings = lr.KVSettings(refresh=refresh, **settings)  # type: ignore[arg-type]
            if grown.old is not None:
                for latent in grown.old:
                    latent.discarded *= 0.5  # any block is then worse
            for _ in range(args.rounds):
                grown.append(*tokens(64))
                start = time.process_time()
                grown.compress()
                taken.append(time.process_time() - start)
            cells.append(f"{1e3 * statistics.median(taken):.2f}")
        rows.append([count, label, *cells])
    return rows


def run(args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    args.rounds = 2 if args.smoke else 15
    lengths = SMOKE if args.smoke else LENGTHS
    steps = [row for count in lengths for row in step_rows(count, args)]
    costs = cost_rows(SMOKE[0] if args.smoke else 8192, args)
    return "\n\n".join(
        [
            f"One query token, {QUERY_HEADS} query and {HEADS} key/value heads of {SIZE}, fp32; 4 first and 128 recent"
            " tokens exact. CPU milliseconds of the process, medians of runs in turn with the dense way, whose 64 MiB"
            " at 8,192 tokens leave nothing of the cache in the processor's; the speed-up is over the fastest dense"
            " way, the ratio of bytes is all that the cache stores, and the share is the one over the other.",
            markdown_table(["tokens", "cache", "ms", "speed-up", "bytes saved", "share of the bytes' bound"], steps),
            "## What a whole step can gain",
            "At most (W + K) / (W + K / c), with W the bytes of the weights, K those of the dense cache and c the"
            " ratio of bytes: a step reads both once.",
            markdown_table(["model", "tokens", "batch", "r = 16", "r = 32"], bound_rows(args)),
            "## What compressing costs",
            "CPU milliseconds per layer: the first fit to all tokens, then each block of 64, with the subspaces frozen,"
            " or fitted again.",
            markdown_table(["tokens", "cache", "first fit", "block, frozen", "block, fitted again"], costs),
        ]
    )


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    args = parser.parse_args()
    text = f"# Decoding from a low-rank cache\n\n{machine(args)}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'kv_decode', text)}")


if __name__ == "__main__":
    main()
