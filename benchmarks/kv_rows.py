"""The caches that benchmarks.kv_real compares, each filled with a prompt."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import lowrank_layers as lr

from .kv_driver import Prompt
from .kv_peers import Float8, Kivi, Palu, Simulated, SnapKV, palu_bases
from .kv_stores import Evicting, LowRank, Store
from .kv_subjects import Subject, spread

Fill = Callable[[Sequence[Prompt]], list[Store]]
"""Makes the caches of all layers and fills them with a prompt."""
RATIOS = (5.0, 7.5)
"""How many times fewer bytes than bf16 evictions and Palu take."""


@dataclass
class Row:
    """A way to compress.

    Args:
        label: its name in a table.
        fill: makes the caches of a sequence.
        shared: bytes of what calibration gives to a model, which all sequences share.
        brief: whether the tasks are run with it too, which take longer.
    """

    label: str
    fill: Fill
    shared: int = 0
    brief: bool = True


def each(make: Callable[[int, Prompt], Store]) -> Fill:
    """One cache per layer, from its index and prompt, each of them by itself."""

    def fill(prompts: Sequence[Prompt]) -> list[Store]:
        stores = [make(layer, prompt) for layer, prompt in enumerate(prompts)]
        for store, prompt in zip(stores, prompts, strict=True):
            store.update(prompt.keys, prompt.values)
        return stores

    return fill


EXACT = Row("exact, bf16", each(lambda layer, prompt: Simulated()))


def eviction_rows(prompt: int, more: int) -> list[Row]:
    """Evictions that hold 1/5 and 1/7.5 of the tokens, the mean over ``more`` steps after the prompt."""
    rows = []
    for ratio in RATIOS:
        kept = round((prompt + more / 2) / ratio)
        picked = max(kept - more // 2, 33)  # it keeps what comes after the prompt
        rows += [
            Row(f"StreamingLLM: 4 first and {kept - 4} recent", each(lambda _, __, kept=kept: Evicting(kept - 4))),
            Row(
                f"SnapKV: {picked} tokens of the prompt per head",
                each(lambda _, prompt, picked=picked: SnapKV(prompt.queries, picked)),
            ),
        ]
    return rows


class Palus:
    """Rows as Palu's, whose bases are computed once."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject = subject
        windows = [w for text in subject.others.values() for w in spread(text, args.calibration, args.window)]
        self.bases = palu_bases(subject.driver, windows, subject.rotation)

    def rows(self) -> list[Row]:
        width = len(self.bases[0][0])
        found = []
        for ratio in RATIOS:
            for bits in (None, 4):
                rank = max(r for r in range(1, width + 1) if Palu.token_bits(r, bits) <= 16 * width / ratio)
                found.append(self.row(rank, bits, brief=bits is not None))
        return found

    def row(self, rank: int, bits: int | None, *, brief: bool) -> Row:
        cut = [(keys[:, :rank], values[:, :rank]) for keys, values in self.bases]
        kind = "fp16" if bits is None else f"int{bits}"
        return Row(
            f"Palu-style: rank {rank} of {len(cut[0][0])}, {kind}",
            each(lambda layer, _: Palu(cut[layer], self.subject.rotation, bits)),
            shared=sum(2 * basis.numel() for pair in cut for basis in pair),
            brief=brief,
        )


def rank_rows(subject: Subject) -> list[Row]:
    """Ours by rank alone, in int8, fitted to the prompt."""
    rows = []
    for rank in (24, 16):
        settings = lr.KVSettings(rank=rank, dtype=torch.int8, keep_recent=32, rope="before")
        rows.append(
            Row(
                f"ours by rank: {rank} per head, int8, fitted to the prompt",
                each(lambda _, __, settings=settings: LowRank(settings, subject.rotation)),
                brief=False,
            )
        )
    return rows


class Rows:
    """All rows of a model; what needs calibration is calibrated once."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject = subject
        self.palu = Palus(subject, args)

    def of(self, prompt: int, more: int) -> list[Row]:
        """The rows for a prompt of so many tokens, and so many after it; the exact cache is not among them."""
        return [
            Row("fp8 (e4m3), a scale per token and head", each(lambda _, __: Float8())),
            Row("int4, KIVI's layout, 32 recent", each(lambda _, __: Kivi(4))),
            Row("int2, KIVI's layout, 32 recent", each(lambda _, __: Kivi(2))),
            *eviction_rows(prompt, more),
            *self.palu.rows(),
            *rank_rows(self.subject),
        ]
