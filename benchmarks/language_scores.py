"""What benchmarks.language measures of a model: perplexity, last words, tokens per second, bytes on disk."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr

from .language_texts import Case

DECODED = 32
"""Tokens that are decoded one by one, for their time."""


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """The perplexity of windows, each read from its beginning."""
    lost, count = 0.0, 0
    for x in windows.split(2):
        logits = model(x, use_cache=False).logits[:, :-1].float()
        lost += float(F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
        count += x[:, 1:].numel()
    return math.exp(min(lost / count, 80.0))


@torch.no_grad()
def last_words(model: Any, endings: list[tuple[Tensor, int]]) -> float:
    """Percentage of passages whose last word is the likeliest one, token by token."""
    right = 0
    ordered = sorted(endings, key=lambda each: len(each[0]))
    for start in range(0, len(ordered), 16):
        part = ordered[start : start + 16]
        padded = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in part], batch_first=True)
        best = model(padded, use_cache=False).logits.argmax(-1)  # what follows in a row changes nothing before it
        for row, (tokens, count) in zip(best, part, strict=True):
            right += bool((row[len(tokens) - count - 1 : len(tokens) - 1] == tokens[-count:]).all())
    return 100 * right / max(1, len(ordered))


@torch.no_grad()
def tokens_per_second(model: Any, window: Tensor, rounds: int) -> tuple[float, float]:
    """Tokens per second of reading a window at once and of decoding token by token after it, medians."""

    def clock() -> float:
        if window.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    read, decoded = [], []
    for _ in range(rounds + 1):
        start = clock()
        output = model(window, use_cache=True)
        middle = clock()
        token = output.logits[:, -1:].argmax(-1)
        for _ in range(DECODED):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        read.append(window.numel() / (middle - start))
        decoded.append(DECODED * len(window) / (clock() - middle))
    return statistics.median(read[1:]), statistics.median(decoded[1:])


def bytes_on_disk(model: Any) -> int:
    """The size of the file that ``save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        lr.save(model, path)
        return path.stat().st_size


def measured(model: Any, case: Case, rounds: int) -> dict[str, float]:
    """Everything by name of the column."""
    found = {name: perplexity(model, windows) for name, windows in case.scored.items()}
    if case.endings:
        found["LAMBADA, %"] = last_words(model, case.endings)
    if rounds:
        window = next(iter(case.scored.values()))[:1]
        found["tokens/s, read"], found["decoded"] = tokens_per_second(model, window, rounds)
    found["MB on disk"] = bytes_on_disk(model) / 1e6
    return found
