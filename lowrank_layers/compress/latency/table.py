"""A price in seconds for every offer, from the times of a few."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from ...cost import Cost
from ...layers import FactoredModule
from ...layers.config import describe
from ...modules import opened_attentions
from ..allocation import Offer
from ..candidates import Candidate
from ..isotonic import rising
from ..method import Method, Option, factored_like
from ..recovery.objective import device_of
from ..registry import settings_of
from .in_place import record_layers, time_replacements
from .run import ExampleRun
from .store import TimeStore

GRID = 5
"""Ranks of each layer and method that are timed before the first choice."""


class LatencyTable:
    """Times of the layers of a model, and of what methods offer in their place.

    A few ranks of each method are timed. The others lie between them on a line over the multiply-accumulates, after the
    times have been made to rise with these (isotonic regression). What is timed later is priced as it was timed. Layers
    of one geometry that see inputs of one shape share their times.

    Args:
        model: the dense model.
        run: the example on which it is timed.
        layers: the layers to plan, by name.
    """

    def __init__(self, model: nn.Module, run: ExampleRun, layers: Mapping[str, Candidate]) -> None:
        self.model, self.run, self.layers = model, run, layers
        self.store = TimeStore(device_of(model))
        with opened_attentions(model):
            self.dense, self.whole = record_layers(model, run, list(layers))
        self._geometries = {name: self._geometry(name) for name in layers}
        self.gain = 1.0
        """Time that the model saves over that which its layers save."""

    def seconds(self, name: str) -> float:
        """Returns the part of a forward pass that a dense layer accounts for: its time, multiplied by ``gain``.

        It is 0 if the example does not reach the layer.
        """
        return self.gain * self.dense[name].seconds if name in self.dense else 0.0

    def measure_grid(self, offers: Mapping[str, Sequence[Offer]]) -> None:
        """Times a few offers of each layer and method, spread evenly over their sizes."""
        wanted = {}
        for name in offers:
            own = _by_method(offers[name])
            wanted[name] = [sized[k] for sized in own.values() for k in _spread(sized)]
        self.measure(wanted)

    def faster(self, methods: Iterable[Method]) -> dict[str, list[Method]]:
        """Returns, for each layer, the methods whose layer of a small rank takes less time than the dense one."""
        offers = {
            name: [Offer(method, Option(layer.round_to, Cost(), 0.0)) for method in methods if method.matches(layer)]
            for name, layer in self.layers.items()
        }
        self.measure(offers)
        known = self.store.ratios
        return {
            name: [offer.method for offer in own if offer.method and known.get(self._key(name, offer), 1.0) < 1]
            for name, own in offers.items()
        }

    def measure(self, wanted: Mapping[str, Sequence[Offer]]) -> bool:
        """Times those of the offers whose time is not known; returns whether there were any."""
        ratios = self.store.ratios
        waiting = {
            key: (self._geometries[name], offer)
            for name, offers in wanted.items()
            for offer in offers
            if name in self.dense and offer.method is not None and (key := self._key(name, offer)) not in ratios
        }
        found = bool(waiting)
        with opened_attentions(self.model):
            while waiting:  # one replacement per layer at a time, so that they take no more memory than the model
                now = {geometry: key for key, (geometry, _) in waiting.items()}
                names = {name: now[each] for name in self.dense if (each := self._geometries[name]) in now}
                built = {name: build_blank(self.layers[name], waiting[key][1]) for name, key in names.items()}
                spent = {key: [0.0, 0.0] for key in now.values()}
                for name, seconds in time_replacements(self.model, self.run, built, self.dense).items():
                    for side in (0, 1):
                        spent[names[name]][side] += seconds[side]
                for key, (dense, other) in spent.items():
                    ratios[key] = max(other, 1e-9) / max(dense, 1e-9)
                    del waiting[key]
        if found:
            self.store.save()
        return found

    def priced(self, offers: Mapping[str, Sequence[Offer]]) -> dict[str, list[Offer]]:
        """Returns the offers with their times as costs."""
        return {name: self._priced(name, list(each)) for name, each in offers.items()}

    def _priced(self, name: str, offers: list[Offer]) -> list[Offer]:
        dense, found = self.seconds(name), {}
        for sized in _by_method(offers).values():
            known = [
                (size(offer), self.store.ratios[key])
                for offer in sized
                if (key := self._key(name, offer)) in self.store.ratios
            ]
            sizes, ratios = [each for each, _ in known], rising([ratio for _, ratio in known])
            for offer in sized:
                exact = self.store.ratios.get(self._key(name, offer))
                ratio = _interpolated(size(offer), sizes, ratios) if exact is None else exact
                found[id(offer)] = dense * ratio
        return [_with_latency(offer, found.get(id(offer), dense)) for offer in offers]

    def _geometry(self, name: str) -> str:
        """What two layers have in common whose times are the same."""
        layer = self.layers[name]
        return json.dumps(
            [describe(layer.module), layer.has_bias, self.dense[name].inputs if name in self.dense else []]
        )

    def _key(self, name: str, offer: Offer) -> str:
        method = offer.method
        made = [] if method is None else [method.name, dict(method.form), settings_of(method), offer.option.rank]
        return f"{self._geometries[name]} {json.dumps(made)}"


def build_blank(layer: Candidate, offer: Offer) -> FactoredModule:
    """Returns the layer of an offer with random weights; the states of random generators stay as they are."""
    assert offer.method is not None
    built = factored_like(offer.method, layer.module, offer.option.rank, layer.has_bias)
    with torch.random.fork_rng():
        built.reset_parameters()  # type: ignore[operator]
    return built.eval().requires_grad_(False)


def size(offer: Offer) -> int:
    """Returns what the time of a method's offers for one layer rises with."""
    return offer.option.cost.macs or offer.option.cost.params


def _by_method(offers: Sequence[Offer]) -> dict[object, list[Offer]]:
    """The offers of each method, the smallest first."""
    found: dict[object, list[Offer]] = {}
    for offer in offers:
        if offer.method is not None:
            found.setdefault(offer.method, []).append(offer)
    return {method: sorted(each, key=size) for method, each in found.items()}


def _spread(sized: Sequence[Offer]) -> list[int]:
    """Positions of offers whose sizes are spread evenly over their range, the ends among them."""
    sizes = [size(offer) for offer in sized]
    points = [sizes[0] + (sizes[-1] - sizes[0]) * k / (GRID - 1) for k in range(GRID)]
    return sorted({min(bisect.bisect_left(sizes, point), len(sizes) - 1) for point in points})


def _interpolated(at: float, sizes: Sequence[float], values: Sequence[float]) -> float:
    """The value of a line through points of rising size; outside of them that of the nearest."""
    if not sizes:
        return 1.0
    right = bisect.bisect_left(sizes, at)
    if right == 0 or right == len(sizes):
        return values[min(right, len(sizes) - 1)]
    part = (at - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return values[right - 1] + part * (values[right] - values[right - 1])


def _with_latency(offer: Offer, seconds: float) -> Offer:
    return replace(offer, option=replace(offer.option, cost=replace(offer.option.cost, latency=seconds)))
