"""Part of benchmarks.kv_real: perplexity, and the divergence from the exact cache, of text after a prompt."""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import markdown_table
from .kv_driver import prefilled
from .kv_row import Row
from .kv_rows import Rows
from .kv_stores import Store
from .kv_subjects import Subject, spread

HEAD = [
    "cache", "KiB per sequence", "bytes saved", "with calibration", "perplexity, %", "KL, 1e-4", "+-", "KL at once",
]  # fmt: skip


@dataclass
class Scores:
    """Of each window: nats per token, the divergence from the exact cache (also of a single step), and bytes."""

    nats: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    at_once: list[float] = field(default_factory=list)
    nbytes: list[float] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)


def continued(subject: Subject, stores: list[Store], tokens: Tensor, start: int, chunk: int) -> tuple[Tensor, float]:
    """Log probabilities of the tokens after ``start``, ``chunk`` of them per step, and the caches' mean bytes."""
    subject.driver.stores = stores
    found, held = [], []
    for at in range(start, len(tokens) - 1, chunk):
        step = tokens[None, at : min(at + chunk, len(tokens) - 1)]
        found.append(subject.driver.logits(step, at)[0].log_softmax(-1))
        held.append(sum(store.nbytes() for store in stores))
    return torch.cat(found), statistics.mean(held)


def divergence(own: Tensor, exact: Tensor) -> float:
    """The mean over tokens of the KL divergence of log probabilities from the exact ones."""
    return max(0.0, float(F.kl_div(own, exact, reduction="none", log_target=True).sum(-1).mean()))


@torch.no_grad()
def scored(subject: Subject, rows: list[Row], windows: list[Tensor], prompt: int, chunk: int) -> list[Scores]:
    """The scores of each row; every window's prompt is read once."""
    found = [Scores() for _ in rows]
    for number, window in enumerate(windows, start=1):
        began = time.perf_counter()
        prompts = prefilled(subject.driver, window[None, :prompt])
        target = window[prompt + 1 :, None]
        exact: Tensor | None = None
        for row, scores in zip(rows, found, strict=True):
            stores = row.fill(prompts)
            again = copy.deepcopy(stores) if chunk < len(window) - 1 - prompt else None
            own, nbytes = single, _ = continued(subject, stores, window, prompt, len(window))
            if again is not None:
                stores = again
                own, nbytes = continued(subject, stores, window, prompt, chunk)
            exact = single if exact is None else exact
            scores.nats.append(-float(own.gather(-1, target).mean()))
            scores.divergences.append(divergence(own, exact))
            scores.at_once.append(divergence(single, exact))
            scores.nbytes.append(nbytes)
            scores.shared.append(sum(store.shared_nbytes() for store in stores))
        print(f"  window {number} of {len(windows)}: {time.perf_counter() - began:.0f} s", flush=True)
    return found


def table(rows: list[Row], found: list[Scores]) -> str:
    exact, cells = found[0], []
    whole = statistics.mean(exact.nbytes)
    for row, own in zip(rows, found, strict=True):
        held, shared = statistics.mean(own.nbytes), statistics.mean(own.shared)
        increase = 100 * math.expm1(statistics.mean(own.nats) - statistics.mean(exact.nats))
        error = statistics.stdev(own.divergences) / math.sqrt(len(own.divergences)) if len(own.divergences) > 1 else 0
        cells.append(
            [
                row.label,
                f"{held / 1024:.0f}",
                f"{whole / held:.2f}",
                f"{whole / (held + shared):.2f}",
                f"{increase:+.2f}",
                f"{1e4 * statistics.mean(own.divergences):.1f}",
                f"{1e4 * error:.1f}",
                f"{1e4 * statistics.mean(own.at_once):.1f}",
            ]
        )
    return markdown_table(HEAD, cells)


def quality(subject: Subject, rows: Rows, args: argparse.Namespace) -> list[str]:
    """A table per length of the prompt and text."""
    parts = [
        f"## {subject.name}: quality",
        f"{args.scored} tokens are scored after each prompt, {args.chunk} per step, so that tokens leave the recent"
        " ones and are compressed as in generation. Arithmetic in fp32, exact keys and values in bf16; every prompt is"
        " read once, exactly, and all caches take its keys and values. Bytes: all that a cache holds, the mean over the"
        " steps; the column with calibration counts what that gives to the model for this one sequence too. KL: mean"
        " over tokens of the divergence from the exact cache's prediction, with the standard error over windows; at"
        " once: where the scored tokens are read in one step, so that only the prompt is compressed.",
    ]
    for prompt in args.lengths or subject.prompts:
        chosen_texts = [name for name in subject.scored if args.texts is None or name in args.texts]
        for index, name in enumerate(chosen_texts):
            text = subject.scored[name]
            # long prompts, and texts after the first, take a part of the windows and of the rows
            whole = index == 0 and prompt <= 4096
            chosen = (rows.of if whole and not args.brief else rows.brief)(prompt, args.scored)
            chosen = [chosen[0], *(row for row in chosen[1:] if re.search(args.only, row.label))]
            count = max(1, args.windows // (8 if prompt > 4096 else 4)) if not whole else args.windows
            length = prompt + args.scored + 1
            print(f"{subject.name}: {name}, {prompt} tokens of prompt", flush=True)
            found = scored(subject, chosen, spread(text, count, length), prompt, args.chunk)
            perplexity = math.exp(statistics.mean(found[0].nats))
            parts += [
                f"### {name}, {prompt} tokens of prompt",
                f"{count} windows. Perplexity of the exact cache: {perplexity:.3f}.",
                table(chosen, found),
            ]
    return parts
