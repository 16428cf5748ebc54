"""The part of benchmarks.language about training: the default, with stages refined or distilled, without labels."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor

import lowrank_layers as lr

REFINED = "default, then `refine_`"
DISTILLED = "default, then `recover_` with the dense model as its teacher"
HELD_OUT = 16
"""One batch out of so many is kept to score the states of a distillation."""


def asked(args: argparse.Namespace) -> list[str]:
    """The rows that are asked for."""
    return [label for label, wanted in ((REFINED, args.refine), (DISTILLED, args.distill)) if wanted]


def tokens_asked(args: argparse.Namespace, length: int = 512) -> int:
    """How many tokens these rows are trained on; those of a distillation are seen once."""
    return max(args.refine, args.distill * args.batch * length * HELD_OUT // (HELD_OUT - 1))


def trained(label: str, model: Any, dense: Any, windows: Tensor, args: argparse.Namespace) -> Any:
    """The model, trained in place.

    Args:
        label: the row.
        model: a compressed model.
        dense: the dense one.
        windows: windows of tokens, ``[count, length]``.
        args: the arguments of the script.
    """
    if label == REFINED:
        windows = windows[:: max(1, windows.numel() // args.refine)]
    batches = [{"input_ids": x, "use_cache": False} for x in windows.split(args.batch)]
    if label == REFINED:
        print(lr.refine_(model, dense, batches), flush=True)
        return model
    held_out = batches[::HELD_OUT]
    others = [batch for k, batch in enumerate(batches) if k % HELD_OUT]
    print(lr.recover_(model, others, teacher=dense, validation=held_out, steps=args.distill, lr=3e-5), flush=True)
    return model
