"""Key/value caches on real language models: quality, retrieval, a task and times, for this and other ways to compress.

Needs transformers (an extra), the folders ``text`` and ``pycode_llama`` in ``LOWRANK_DATA``, and SmolLM2 (see
benchmarks/smollm2.py); ``--smoke`` builds small random models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .common import arguments, machine, write_result
from .kv_real_quality import quality
from .kv_real_tasks import lambada, passkey
from .kv_real_times import times
from .kv_rows import Rows
from .kv_subjects import NAMES, subject

PARTS = ("quality", "passkey", "lambada", "time")
TEXTS = ("WikiText", "code", "stories")


def run(args: argparse.Namespace) -> str:
    found: list[str] = []
    for name in args.models:
        torch.manual_seed(0)
        model = subject(name, args)
        rows = Rows(model, args)
        reads_text = name == "smollm2"  # the other knows code only
        if "quality" in args.parts:
            found += quality(model, rows, args)
        if "passkey" in args.parts and reads_text:
            found += passkey(model, rows, args)
        if "lambada" in args.parts and reads_text:
            found += lambada(model, rows, args)
        if "time" in args.parts:
            found += times(model, rows, args)
    return "\n\n".join(found)


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"got {unknown}, expected some of {','.join(known)}")
        return chosen

    return read


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--brief", action="store_true", help="fewer caches for every text")
    parser.add_argument("--smoke", action="store_true", help="random models, seconds")
    parser.add_argument("--models", type=names(NAMES), default=list(NAMES), help="some of " + ",".join(NAMES))
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2's .gguf file; by default the package's")
    parser.add_argument("--windows", type=int, default=16, help="windows of the first text, at the shorter prompt")
    parser.add_argument("--texts", type=names(TEXTS), help="some of " + ",".join(TEXTS) + "; by default all")
    parser.add_argument("--scored", type=int, default=256, help="tokens that are scored after a prompt")
    parser.add_argument("--chunk", type=int, default=8, help="tokens per step of a score; 1 is exactly generation")
    parser.add_argument("--transforms", type=Path, help="folder that keeps what calibration gives")
    parser.add_argument("--only", default="", help="a regular expression for the caches that are compared")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens of the prompts; by default the model's")
    parser.add_argument("--calibration", type=int, default=24, help="windows of each text for calibration")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window for calibration")
    parser.add_argument("--trials", type=int, default=10, help="pass keys per length")
    parser.add_argument("--passages", type=int, default=200, help="passages of LAMBADA")
    parser.add_argument("--step", type=int, default=32, help="tokens per step in a passage")
    parser.add_argument("--rounds", type=int, default=3, help="prompts per cache whose time is taken")
    args = parser.parse_args()
    if args.smoke:
        args.windows, args.scored, args.calibration, args.window = 2, 32, 2, 128
        args.trials, args.passages, args.rounds = 2, 4, 1
    title = f"# Key/value caches on real language models\n\n{machine(args, 'transformers')}"
    text = f"{title}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'kv_real', text)}")


if __name__ == "__main__":
    main()
