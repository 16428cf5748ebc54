"""One entry of a plan: what a layer becomes, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from ..cost import Cost
from ..layers import layer_cost, layer_writes
from ..layers.config import Spec, blank
from .method import Method, factored_like
from .registry import DENSE, METHODS, as_tuples, settings_of, with_settings

MACS_PER_VALUE = 150
"""Multiply-accumulates in the time of writing one value (convolutions at batch 64 on one x86 core with AVX-512)."""


@dataclass(frozen=True)
class Entry:
    """What one layer becomes.

    Args:
        name: the layer's name in the model.
        method: name of the method, or ``"dense"``.
        rank: what the method takes; ``None`` when dense.
        before: cost of the dense layer.
        after: cost of the factored layer.
        error: estimated relative error of the layer's output (weighted when there were statistics);
            ``None`` after an edit.
        layer: the dense layer's settings.
        bias: whether the factored layer has a bias.
        input_shape: shape of one sample's input, where known.
        repeats: inputs of that shape per sample of the model.
        settings: fields of the method that planned the layer and will build it.
        loss: predicted growth of the loss, in the units of the statistics; ``None`` where the loss does not depend on
            the layer, and after an edit.
    """

    name: str
    method: str
    rank: Any
    before: Cost
    after: Cost
    error: float | None
    layer: Spec
    bias: bool
    input_shape: tuple[int, ...] | None = None
    repeats: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None

    def built_by(self) -> Method:
        """Returns the method that builds the layer, with its settings."""
        return with_settings(self.method, self.settings)

    @property
    def label(self) -> str:
        """The method's name, with the settings in which it differs from the registered instance."""
        usual = settings_of(METHODS[self.method]) if self.method in METHODS else {}
        own = [f"{name}={value!r}" for name, value in self.settings.items() if value != usual.get(name)]
        return f"{self.method}({', '.join(own)})" if own else self.method

    def with_rank(self, method: str, rank: Any) -> Entry:
        """Returns the same layer at another rank, priced by count.

        Args:
            method: name of the method that will build it; another one has the settings it is registered with.
            rank: what the method takes.
        """
        settings = self.settings if method == self.method else settings_of(METHODS[method])
        meta = factored_like(with_settings(method, settings), blank(self.layer), rank, self.bias)
        cost = layer_cost(meta, self.input_shape)
        after = Cost(cost.params, round(cost.macs * self.repeats), cost.bytes)
        return replace(self, method=method, rank=meta.rank, after=after, error=None, settings=settings, loss=None)

    def time(self) -> tuple[float, float] | None:
        """Returns the times of the dense and of the planned layer; ``None`` where nothing is known of them.

        They are seconds where layers were timed, under a limit on latency. Otherwise they are estimated, in MACs, where
        there are statistics: a layer writes its output to memory whatever its rank, and a chain of thin layers does so
        several times.
        """
        if self.before.latency and self.after.latency:
            return self.before.latency, self.after.latency
        if self.input_shape is None:
            return None
        dense = planned = blank(self.layer)
        if self.method != DENSE:
            planned = factored_like(self.built_by(), dense, self.rank, self.bias)
        writes = [MACS_PER_VALUE * self.repeats * layer_writes(each, self.input_shape) for each in (dense, planned)]
        return self.before.macs + writes[0], self.after.macs + writes[1]


def read_entry(raw: dict[str, Any]) -> Entry:
    """The entry that a plan's file holds as plain values.

    Raises:
        LowRankError: if its method is not registered.
    """
    shape = raw["input_shape"]
    values = {
        **raw,
        "rank": as_tuples(raw["rank"]),
        "before": Cost(**raw["before"]),
        "after": Cost(**raw["after"]),
        "input_shape": None if shape is None else tuple(shape),
        "settings": {key: as_tuples(value) for key, value in raw["settings"].items()},
    }
    if raw["method"] != DENSE:
        with_settings(raw["method"], values["settings"])  # raises where no such method is registered
    for name in ("error", "loss"):
        if raw.get(name) is not None and not math.isfinite(raw[name]):
            raise TypeError(f"{name} is not finite")
    return Entry(**values)
