"""A row of benchmarks.kv_real: a way to compress the caches of all layers, and how they take a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .kv_driver import Prompt
from .kv_peers import Simulated
from .kv_stores import Store

Fill = Callable[[Sequence[Prompt]], list[Store]]
"""Makes the caches of all layers and fills them with a prompt."""


@dataclass
class Row:
    """A way to compress.

    Args:
        label: its name in a table.
        fill: makes the caches of a sequence.
        brief: whether it takes part in the tasks and in texts after the first, too.
    """

    label: str
    fill: Fill
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
