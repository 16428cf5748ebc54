"""Rows of benchmarks.kv_real: the cache of this library, calibrated or fitted to the prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lowrank_layers as lr
from lowrank_layers.kv_cache.bit_fit import BitPlan

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
            path = None if args.transforms is None else args.transforms / f"{subject.name} {label}.safetensors"
            if path is not None and path.exists():
                self.transforms[label] = lr.KVTransforms.load(path)
                continue
            windows = [w[None] for name in names for w in spread(texts[name], args.calibration, args.window)]
            self.transforms[label] = lr.calibrate_kv(subject.model, windows)
            if path is not None:
                self.transforms[label].save(path)

    def rows(self, tokens: int) -> list[Row]:
        """The rows for about so many tokens, at which int4's bytes are met."""
        at_int4 = {"int4's bytes": Kivi.ratio(4, tokens)}
        sizes = {f"1/{ratio:g} of the bytes": ratio for ratio in self.ratios}
        calibrated, found = list(self.transforms), []
        for label in calibrated:
            last = label == calibrated[-1]
            for size, ratio in (sizes | at_int4 if last else sizes).items():
                found.append(self.row(f"ours, {label}, {size}", ratio, label, brief=ratio >= 5))
        bits = f"{lr.KVSettings().mean_bits:g} bits"
        found.append(self.row(f"ours, fitted to the prompt, {bits}", None, None, brief=True))
        for size, ratio in (sizes | at_int4).items():
            # bases of a sequence's own leave nothing for its tokens at the smallest size
            if ratio < 10:
                found.append(self.row(f"ours, fitted to the prompt, {size}", ratio, None, brief=ratio == RATIOS[0]))
        return found

    def row(self, label: str, ratio: float | None, calibrated: str | None, *, brief: bool) -> Row:
        """A cache with 1/ratio of the exact bytes at the end of the prompt, or the default."""
        settings = lr.KVSettings()
        plans: Sequence[BitPlan | None] = [None] * self.subject.layers
        if calibrated is not None:
            plans = self.transforms[calibrated].plans(settings.mean_bits)

        def fill(prompts: Sequence[Prompt]) -> list[Store]:
            stores = [LowRank(settings, self.subject.rotation) for _ in prompts]
            for store, prompt, plan in zip(stores, prompts, plans, strict=True):
                store.cache.fits.plan = plan
                store.append(prompt.keys, prompt.values)
            if ratio is not None:
                lr.compress_together([store.cache for store in stores], 1 / ratio)
            for store in stores:
                store.cache.compress()
                store.rebuilt.kept = store.cache.dense()
            return list(stores)

        return Row(label, fill, brief)
