"""Resident memory of low-rank key/value caches and a dense one, each in its own process."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, write_result

HEADS, SIZE, CHUNK, STEPS = 8, 128, 512, 192
"""Number and size of the key and value heads, tokens per chunk of the prompt, single tokens after it."""
CACHES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "r = 16 after RoPE, per head": {"rank": 16, "rope": "after", "joint": False},
    "r = 32 after RoPE, per head": {"rank": 32, "rope": "after", "joint": False},
    "r = 16 before RoPE, heads joint": {"rank": 16},
    "r = 16 before RoPE, heads joint, int8": {"rank": 16, "dtype": torch.int8},
    "2.5 bits, keys in their tile's frame": {"bits": 2.5},
}


def resident() -> int:
    """Resident bytes of this process (Linux), after freed memory has been returned to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status: no line VmRSS")


class Dense:
    """A dense cache: keys and values in buffers of their final length."""

    def __init__(self, batch: int, length: int) -> None:
        self.kept = torch.zeros(2, batch, HEADS, length, SIZE)
        self.tokens = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        stop = self.tokens + keys.shape[2]
        self.kept[0, :, :, self.tokens : stop], self.kept[1, :, :, self.tokens : stop] = keys, values
        self.tokens = stop

    def compress(self) -> None:
        """Does nothing."""

    def nbytes(self) -> int:
        return self.kept.nbytes


@torch.no_grad()
def fill(label: str, layers: int, batch: int, length: int) -> dict[str, int]:
    """Appends a prompt in chunks, then single tokens, to the cache of each layer, and returns the bytes."""
    settings = CACHES[label]

    def cache(rotation: lr.Rotation) -> Dense | lr.LowRankKV:
        if settings is None:
            return Dense(batch, length)
        return lr.LowRankKV(lr.KVSettings(refresh=None, **settings), rotation)

    def append(to: Dense | lr.LowRankKV, count: int) -> None:
        to.append(*torch.randn(2, batch, HEADS, count, SIZE))
        to.compress()

    # libraries load and threads start with the first layer, which does not count
    warm = cache(lr.Rotation.of(SIZE))
    for count in (CHUNK, CHUNK, 1):
        append(warm, count)
    del warm
    before = resident()
    rotation = lr.Rotation.of(SIZE)
    caches = [cache(rotation) for _ in range(layers)]
    prompt = length - min(STEPS, length // 2)
    for start in range(0, prompt, CHUNK):
        for each in caches:
            append(each, min(CHUNK, prompt - start))
    for _ in range(length - prompt):
        for each in caches:
            append(each, 1)
    shared = 0 if settings is None else rotation.nbytes()
    return {"resident": resident() - before, "nbytes": sum(each.nbytes() for each in caches) + shared}


def measured(label: str, args: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.kv_memory", "--threads", str(args.threads), "--fill", label]
    command += ["--layers", str(args.layers), "--batch", str(args.batch), "--length", str(args.length)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(args: argparse.Namespace) -> str:
    labels = list(CACHES)[:2] if args.smoke else CACHES
    found = {label: measured(label, args) for label in labels}
    dense = found["dense"]
    rows = [
        [
            label,
            f"{each['resident'] / 2**20:.1f}",
            f"{each['nbytes'] / 2**20:.1f}",
            f"{each['resident'] / each['nbytes']:.3f}",
            f"{dense['resident'] / each['resident']:.2f}",
            f"{dense['nbytes'] / each['nbytes']:.2f}",
        ]
        for label, each in found.items()
    ]
    head = ["cache", "resident, MiB", "nbytes(), MiB", "resident / nbytes()", "saved, resident", "saved, nbytes()"]
    return "\n\n".join(
        [
            f"{args.layers} layers, batch {args.batch}, {args.length:,} tokens, {HEADS} heads of {SIZE}, fp32, each"
            f" cache in a process of its own: a prompt in chunks of {CHUNK}, then single tokens. Resident: what the"
            " process grew by, after what was freed has gone back to the system.",
            markdown_table(head, rows),
        ]
    )


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32768, help="number of tokens")
    parser.add_argument("--fill", choices=CACHES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.fill:
        torch.set_num_threads(args.threads)
        print(json.dumps(fill(args.fill, args.layers, args.batch, args.length)))
        return
    if args.smoke:
        args.layers, args.length = 1, 1024
    text = f"# Memory of a low-rank cache\n\n{machine(args)}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'kv_memory', text)}")


if __name__ == "__main__":
    main()
