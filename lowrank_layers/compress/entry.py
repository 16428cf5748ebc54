"""One entry of a plan: what a layer becomes, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..cost import Cost
from ..errors import LowRankError
from ..layers import layer_cost, layer_writes, round_factors_
from ..layers.config import Spec, blank
from .group_method import LayerGroup
from .int8 import check_bits, int8_like
from .method import Method, factored_like
from .registry import DENSE, GROUP_METHODS, METHODS, as_tuples, settings_of, with_settings

MACS_PER_VALUE = 150
"""Multiply-accumulates in the time of writing one value (convolutions at batch 64 on one x86 core with AVX-512)."""


@dataclass(frozen=True)
class Entry:
    """What one layer becomes.

    Args:
        name: the layer's name in the model.
        method: name of the method, or ``"dense"``.
        rank: what the method takes, or the number of units that stay; ``None`` when dense.
        before: cost of the dense layer.
        after: cost of the factored layer.
        error: estimated relative error of the layer's output (weighted when there were statistics);
            ``None`` after an edit.
        layer: the dense layer's settings.
        bias: whether the factored layer has a bias.
        input_shape: shape of one sample's input, where known.
        repeats: inputs of that shape per sample of the model.
        settings: fields of the method that planned the layer and will build it; of a method over several layers the
            group of layers.
        loss: predicted growth of the loss, in the units of the statistics; ``None`` where the loss does not depend on
            the layer, and after an edit.
        bits: 8 if its weights, or those of its factors, are stored in int8; ``None`` for floating point.
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
    bits: int | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether the layer changes together with others, by a method over several layers."""
        return self.method in GROUP_METHODS

    @property
    def group(self) -> LayerGroup:
        """The layers that it changes with."""
        return GROUP_METHODS[self.method].read(self.settings)

    @property
    def is_replaced(self) -> bool:
        """Whether another layer takes its place: a low-rank one, or one in int8."""
        return not (self.stays or self.is_grouped)

    @property
    def stays(self) -> bool:
        """Whether the layer stays dense and in floating point."""
        return self.method == DENSE and self.bits is None

    def built_by(self) -> Method:
        """Returns the method that builds the layer, with its settings.

        Raises:
            LowRankError: if a method over several layers changes it.
        """
        if self.is_grouped:
            raise LowRankError(
                f"{self.name!r}: the method {self.method!r} changes several layers together, expected a method of"
                " single layers; factorize_ with statistics applies both."
            )
        return with_settings(self.method, self.settings)

    @property
    def label(self) -> str:
        """The method's name, with the settings in which it differs from the registered instance, and int8."""
        if self.is_grouped:
            return self.method
        usual = settings_of(METHODS[self.method]) if self.method in METHODS else {}
        own = [f"{name}={value!r}" for name, value in self.settings.items() if value != usual.get(name)]
        name = f"{self.method}({', '.join(own)})" if own else self.method
        return name if self.bits is None else f"{name} int{self.bits}"

    def with_rank(self, method: str, rank: Any) -> Entry:
        """Returns the same layer at another rank, with as many bits, priced by count.

        Args:
            method: name of the method that will build it; another one has the settings it is registered with.
            rank: what the method takes.
        """
        if method in GROUP_METHODS:
            changed = replace(self, rank=rank, error=None, loss=None)
            shape = self.group.shape_at(self.name, self.input_shape, self.layer, rank)
            return replace(changed, after=self._counted(changed.resized(), shape))
        settings = self.settings if method == self.method else settings_of(METHODS[method])
        meta = factored_like(with_settings(method, settings), blank(self.layer), rank, self.bias)
        if self.bits is not None:
            round_factors_(meta, filled=False)
        changed = replace(self, method=method, rank=meta.rank, error=None, settings=settings, loss=None)
        return replace(changed, after=self._counted(meta, self.input_shape))

    def resized(self) -> nn.Module:
        """Returns the layer as a method over several layers leaves it, on the meta device."""
        return blank(self.group.spec_at(self.name, self.layer, self.rank))

    def with_bits(self, bits: int | None) -> Entry:
        """Returns the same layer in int8, or in floating point again, priced by count.

        Args:
            bits: 8 or ``None``.

        Raises:
            LowRankError: for other bits, and for a layer that cannot be stored in int8.
        """
        check_bits(bits)
        if self.is_grouped:
            raise LowRankError(
                f"got bits={bits} for a layer with the method {self.method!r}, which is not combined with int8; drop it"
                " from the plan first."
            )
        changed = replace(self, bits=bits, error=None, loss=None)
        if self.method != DENSE:
            return changed.with_rank(self.method, self.rank)
        if bits is None:
            return replace(changed, after=self.before, error=0.0, loss=0.0)
        return replace(changed, after=self._counted(int8_like(blank(self.layer), bias=self.bias), self.input_shape))

    def _counted(self, layer: nn.Module, input_shape: tuple[int, ...] | None) -> Cost:
        """The cost of a layer in the place of this one."""
        cost = layer_cost(layer, input_shape)
        return Cost(cost.params, round(cost.macs * self.repeats), cost.bytes)

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
        if self.is_grouped:
            planned = self.resized()
        elif self.method != DENSE:
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
    check_bits(values.get("bits"))
    if raw["method"] in GROUP_METHODS:
        GROUP_METHODS[raw["method"]].read(values["settings"])  # raises where they are no group
    elif raw["method"] != DENSE:
        with_settings(raw["method"], values["settings"])  # raises where no such method is registered
    for name in ("error", "loss"):
        if raw.get(name) is not None and not math.isfinite(raw[name]):
            raise TypeError(f"{name} is not finite")
    return Entry(**values)
