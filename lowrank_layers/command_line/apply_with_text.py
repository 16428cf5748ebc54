"""``lowrank apply --text``: a model's folder, calibrated on text, compressed without being in memory as a whole."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import compress_checkpoint
from ..compress import Plan
from ..errors import LowRankError, MissingExtraError
from ..rank import Budget

WINDOWS, LENGTH = 32, 512
"""How many windows of how many tokens are read, where nothing else is asked for."""


def add_text(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments.

    Args:
        parser: the parser of the command.
    """
    text = "text to calibrate on; CHECKPOINT is then a folder of transformers with its tokenizer, OUT a new folder"
    parser.add_argument("--text", type=Path, help=text)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"windows of text to read ({WINDOWS})")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens per window ({LENGTH})")


def apply_with_text(args: argparse.Namespace) -> Plan:
    """Writes the folder, and returns its plan.

    Args:
        args: the arguments of ``lowrank apply``.
    """
    if args.budget is None or args.tied or args.include:
        raise LowRankError("got --text; it goes with --budget and --exclude alone.")
    batches = list(windows(args.checkpoint, args.text, args.windows, args.length).split(1))
    skip = [partial(_matches, re.compile(pattern)) for pattern in args.exclude]
    progress = sys.stderr.isatty()
    budget = Budget(params=args.budget)
    return compress_checkpoint(args.checkpoint, args.out, budget, batches, skip=skip, progress=progress)


def _matches(pattern: re.Pattern[str], name: str, _: object) -> bool:
    return pattern.search(name) is not None


def windows(folder: Path, text: Path, count: int, length: int) -> Tensor:
    """Returns windows of a text as token ids, ``[count, length]``, spread over all of it.

    Args:
        folder: a folder of transformers.
        text: the file.
        count: the number of windows.
        length: tokens per window.

    Raises:
        LowRankError: for a text that is missing or too short, and a folder without a tokenizer.
        MissingExtraError: if transformers is not installed.
    """
    if count < 1 or length < 2:
        raise LowRankError(f"got --windows {count} --length {length}, expected at least 1 and 2.")
    if not text.is_file():
        raise LowRankError(f"--text: {text}: there is no such file.")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtraError('--text needs transformers: pip install "lowrank-layers[transformers]".') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise LowRankError(f"{folder}: has no tokenizer of transformers: {error}") from None
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < count * length:
        raise LowRankError(
            f"{text}: has {len(ids):,} tokens, expected {count} windows of {length}; give more text, or less --windows."
        )
    step = (len(ids) - length) // max(1, count - 1)
    return torch.stack([ids[k * step :][:length] for k in range(count)])
