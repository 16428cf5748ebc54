"""Part of benchmarks.kv_real: times of a model's own call with ``LowRankCache`` and with ``DynamicCache``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import lowrank_layers as lr

from .common import markdown_table, now
from .kv_rows import Rows
from .kv_subjects import Subject

LENGTHS = (2048, 8192)
ROOM = 64
"""Tokens that are left below the length for the steps."""
HEAD = [
    "tokens", "cache", "step, ms", "speed-up", "of all steps", "attention, ms", "speed-up", "of all steps",
    "prompt, s", "of DynamicCache's",
]  # fmt: skip


class Stopwatch:
    """The time that a model's attentions take from the end of RoPE to the output's projection: caches and attention."""

    def __init__(self, device: str) -> None:
        self.device, self.started, self.total = device, 0.0, 0.0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Looks at the model's calls inside."""
        attentions = [layer.self_attn for layer in model.model.layers]
        module = sys.modules[type(attentions[0]).__module__]
        rotate: Callable[..., Any] = module.apply_rotary_pos_emb

        def rotated(*args: Any, **kwargs: Any) -> Any:
            found = rotate(*args, **kwargs)
            self.started = now(self.device)
            return found

        def stop(*_: Any) -> None:
            self.total += now(self.device) - self.started

        hooks = [attention.o_proj.register_forward_pre_hook(stop) for attention in attentions]
        module.apply_rotary_pos_emb = rotated  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]
            for hook in hooks:
                hook.remove()


def caches(rows: Rows) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Labels, attention implementations, and what makes a cache; the first is what the others are compared with."""
    from transformers import DynamicCache

    transforms = list(rows.ours.transforms.values())[-1]
    return {
        "DynamicCache, SDPA": ("sdpa", DynamicCache),
        "LowRankCache(), fitted to the prompt": ("lowrank", lr.LowRankCache),
        "LowRankCache(subspaces=...), calibrated": ("lowrank", lambda: lr.LowRankCache(subspaces=transforms)),
    }


@torch.no_grad()
def measured(
    model: Any, tokens: Tensor, steps: int, rounds: int, made: Mapping[str, tuple[str, Callable[[], Any]]]
) -> dict[str, list[list[float]]]:
    """Seconds of each cache: those of each prompt, of each step, and of the attentions in each step."""
    found: dict[str, list[list[float]]] = {label: [[], [], []] for label in made}
    held: dict[str, Any] = {}
    device = tokens.device.type
    prompt, rest = tokens[None, : len(tokens) - steps - 1], tokens[len(tokens) - steps - 1 :]
    for turn in range(rounds):
        for label in list(made)[:: -1 if turn % 2 else 1]:
            implementation, make = made[label]
            model.set_attn_implementation(implementation)
            held[label] = make()
            start = now(device)
            model(prompt, past_key_values=held[label], logits_to_keep=1)
            model(rest[None, :1], past_key_values=held[label])
            found[label][0].append(now(device) - start)
    watch = Stopwatch(device)
    with watch.watching(model):
        for at in range(1, steps + 1):
            # they take turns to go first
            order = list(made)[:: 1 if at % 2 else -1]
            for label in order:
                model.set_attn_implementation(made[label][0])
                watch.total = 0.0
                start = now(device)
                model(rest[None, at : at + 1], past_key_values=held[label])
                found[label][1].append(now(device) - start)
                found[label][2].append(watch.total)
    return found


def times(subject: Subject, rows: Rows, args: argparse.Namespace) -> list[str]:
    table: list[list[object]] = []
    made = caches(rows)
    text = next(iter(subject.scored.values()))
    lengths = (160,) if args.smoke else tuple(n for n in LENGTHS if n <= subject.model.config.max_position_embeddings)
    steps = 4 if args.smoke else ROOM - 1
    for length in lengths or (subject.model.config.max_position_embeddings,):
        (dense, exact), *others = made.items()
        for other, cache in others:
            # by pairs: the more caches take turns, the less of each is left in the processor's
            found = measured(subject.model, text[:length], steps, args.rounds, {dense: exact, other: cache})
            base = found[dense]
            for label, own in found.items():
                cells: list[object] = [length, label]
                for which in (1, 2):
                    ratios = [theirs / ours for theirs, ours in zip(base[which], own[which], strict=True)]
                    cells += [f"{1e3 * statistics.median(own[which]):.1f}", f"{statistics.median(ratios):.2f}"]
                    cells.append(f"{sum(base[which]) / sum(own[which]):.2f}")
                share = statistics.median(ours / theirs for theirs, ours in zip(base[0], own[0], strict=True))
                cells += [f"{statistics.median(own[0]):.2f}", f"{share:.2f}"]
                table.append(cells)
        print(f"{subject.name}: times at {length} tokens", flush=True)
    return [
        f"## {subject.name}: times",
        f"`model(...)` in fp32, batch 1: medians of {steps} steps of one token, taken in turn by two caches; the"
        " speed-up of all steps counts those too in which tokens are compressed. Attention: what a step spends between"
        " RoPE and the output's projection, in all layers: the cache and the attention. Prompt: reading it and the step"
        " after it,"
        f" with all fits, the median of {args.rounds}.",
        markdown_table(HEAD, table),
    ]
