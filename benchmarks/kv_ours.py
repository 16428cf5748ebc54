"""Rows of benchmarks.kv_real: the cache of this library, calibrated or fitted to the prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lowrank_layers as lr
from lowrank_layers.kv_cache.bit_fit import BitPlan, plan_bits

from .kv_driver import Prompt
from .kv_peers import Kivi
from .kv_row import Row
from .kv_stores import LowRank, Store
from .kv_subjects import Subject, spread

RATIOS = (5.0, 7.5, 14.0)
"""How many times fewer bytes than bf16 the caches take at the end of the prompt, all counted."""


class Ours:
    """Rows of ours; what needs calibration is calibrated once."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.ratios = subject, (2.0,) if args.smoke else RATIOS
        self.transforms: dict[str, lr.KVTransforms] = {}
        subject.model.set_attn_implementation("sdpa")
        texts = subject.others
        first = next(iter(texts))
        kinds = {f"calibrated on {first}": [first], "calibrated on all texts": list(texts)}
        for label, names in list(kinds.items())[: len(texts)]:
            windows = [w[None] for name in names for w in spread(texts[name], args.calibration, args.window)]
            self.transforms[label] = lr.calibrate_kv(subject.model, windows)

    def rows(self, tokens: int) -> list[Row]:
        """The rows for about so many tokens.

        Args:
            tokens: their number, at which the bytes of int4 are met.
        """
        sizes = (*self.ratios, Kivi.ratio(4, tokens))
        found = [
            self.row(f"ours, {label}, 1/{ratio:.3g}", ratio, label, brief=label == list(self.transforms)[-1])
            for label in self.transforms
            for ratio in sizes
        ]
        found.append(self.row("ours, calibrated on all texts, default", None, list(self.transforms)[-1], brief=False))
        found.append(self.row("ours, fitted to the prompt, default", None, None, brief=True))
        # bases of a sequence's own leave nothing for its tokens at the smallest size
        return found + [
            self.row(f"ours, fitted to the prompt, 1/{ratio:.3g}", ratio, None, brief=ratio < 6)
            for ratio in sizes
            if ratio < 10
        ]

    def row(self, label: str, ratio: float | None, calibrated: str | None, *, brief: bool) -> Row:
        """A cache with 1/ratio of the exact bytes at the end of the prompt, or the default."""
        settings = lr.KVSettings()
        plans: Sequence[BitPlan | None] = [None] * self.subject.layers
        if calibrated is not None:
            plans = plan_bits(list(self.transforms[calibrated]), settings.mean_bits, shared=True)

        def fill(prompts: Sequence[Prompt]) -> list[Store]:
            stores = [LowRank(settings, self.subject.rotation) for _ in prompts]
            for store, prompt, plan in zip(stores, prompts, plans, strict=True):
                store.cache.plan = plan
                store.cache.append(prompt.keys, prompt.values)
            caches = [store.cache for store in stores]
            if ratio is not None:
                lr.compress_together(caches, 1 / ratio)
            for cache in caches:
                cache.compress()
            return list(stores)

        return Row(label, fill, brief)
