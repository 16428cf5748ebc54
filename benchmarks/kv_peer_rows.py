"""Rows of benchmarks.kv_real: other ways to compress a cache, and this library's by rank alone."""

from __future__ import annotations

import argparse

import torch

import lowrank_layers as lr

from .kv_peers import Float8, Kivi, Palu, SnapKV, palu_bases
from .kv_row import Row, each
from .kv_stores import Evicting, LowRank
from .kv_subjects import Subject, spread

RATIOS = (5.0, 7.5)
"""How many times fewer bytes than bf16 evictions and Palu take."""


def quantized_rows() -> list[Row]:
    """All numbers rounded alike."""
    return [
        Row("fp8 (e4m3), a scale per token and head", each(lambda _, __: Float8())),
        Row("int4, KIVI's layout, 32 recent", each(lambda _, __: Kivi(4))),
        Row("int2, KIVI's layout, 32 recent", each(lambda _, __: Kivi(2))),
    ]


def eviction_rows(prompt: int, more: int) -> list[Row]:
    """Evictions that hold 1/5 and 1/7.5 of the tokens, the mean over ``more`` steps after the prompt."""
    rows = []
    for ratio in RATIOS:
        first = ratio == RATIOS[0]
        kept = round((prompt + more / 2) / ratio)
        picked = max(kept - more // 2, 33)  # it keeps what comes after the prompt
        rows += [
            Row(f"StreamingLLM, 1/{ratio:g} of the tokens", each(lambda _, __, kept=kept: Evicting(kept - 4)), first),
            Row(
                f"SnapKV, 1/{ratio:g} of the tokens",
                each(lambda _, prompt, picked=picked: SnapKV(prompt.queries, picked)),
                first,
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
        for bits, ratio in ((None, RATIOS[0]), *((4, ratio) for ratio in RATIOS)):
            rank = max(r for r in range(1, width + 1) if Palu.token_bits(r, bits) <= 16 * width / ratio)
            found.append(self.row(rank, bits, brief=bits is not None and ratio == RATIOS[0]))
        return found

    def row(self, rank: int, bits: int | None, *, brief: bool) -> Row:
        cut = [(keys[:, :rank], values[:, :rank]) for keys, values in self.bases]
        kind = "fp16" if bits is None else f"int{bits}"
        return Row(
            f"Palu-style: rank {rank} of {len(cut[0][0])}, {kind}",
            each(lambda layer, _: Palu(cut[layer], self.subject.rotation, bits)),
            brief=brief,
        )


def rank_row(subject: Subject) -> Row:
    """Ours by rank alone, in int8, fitted to the prompt."""
    settings = lr.KVSettings(rank=16, dtype=torch.int8, keep_recent=32)
    fill = each(lambda _, __: LowRank(settings, subject.rotation))
    return Row("ours by rank: 16 per head, int8, fitted to the prompt", fill, brief=False)
