"""Timing of layers and of what may replace them, inside the running model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .run import ExampleRun

_SECONDS = 0.3
"""Time that the repeated passes of one set of replacements may take, before there are fewer of them."""
_WARM_UP = 2
"""Passes before the first that counts."""
_TIMES = (5, 15)
"""Least and greatest number of times whose median is taken."""


@dataclass
class LayerCalls:
    """What a layer is called with in one forward pass, what it returns, and how long that takes.

    Args:
        inputs: shape, strides and dtype of the input of each call.
        outputs: what it returns.
        seconds: the time of all calls in a pass.
    """

    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


def record_layers(model: nn.Module, run: ExampleRun, names: list[str]) -> tuple[dict[str, LayerCalls], float]:
    """Returns the calls of each layer that the forward pass comes to, with their times, and the time of a whole pass.

    Args:
        model: the model, its attentions opened.
        run: the example.
        names: the layers.
    """
    found: dict[str, LayerCalls] = defaultdict(LayerCalls)

    def recording(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor) -> Tensor:
            output = forward(x)
            found[name].inputs.append((tuple(x.shape), x.stride(), str(x.dtype)))
            found[name].outputs.append(output.clone())
            return output

        return call

    with run.ready(model), _forwards(model, {n: recording(n, model.get_submodule(n).forward) for n in names}):
        run.call(model)
    plain, timed = _by_turns(model, run, [{}, {name: model.get_submodule(name).forward for name in found}], found)
    for name, each in found.items():
        each.seconds = timed[name]
    return dict(found), plain[""]


def time_replacements(
    model: nn.Module, run: ExampleRun, built: Mapping[str, nn.Module], calls: Mapping[str, LayerCalls]
) -> dict[str, tuple[float, float]]:
    """Returns the seconds per pass of each layer, and of what is to replace it, in passes by turns.

    The model runs with the replacements in place, so that they find their inputs, their weights and the caches of the
    processor as they will. Their outputs are dropped for those that were recorded: what follows sees what it always
    does.

    Args:
        model: the model, its attentions opened.
        run: the example.
        built: the replacements, by the names of the layers.
        calls: the recorded calls.
    """
    dense = {name: model.get_submodule(name).forward for name in built}
    first, second = _by_turns(model, run, [dense, {name: new.forward for name, new in built.items()}], calls)
    return {name: (first[name], second[name]) for name in built}


def _by_turns(
    model: nn.Module,
    run: ExampleRun,
    turns: Sequence[Mapping[str, Callable[..., Tensor]]],
    calls: Mapping[str, LayerCalls],
) -> list[dict[str, float]]:
    """Median seconds that each forward takes in a pass, and, by the name ``""``, the pass itself; for each turn."""
    clock = run.clock_for(model)
    totals: dict[str, float] = defaultdict(float)

    def timed(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        outputs, call = calls[name].outputs, 0

        def timing(x: Tensor) -> Tensor:
            nonlocal call
            start = clock()
            forward(x)
            totals[name] += clock() - start
            call += 1
            return outputs[(call - 1) % len(outputs)].clone()

        return timing

    timing = [{name: timed(name, forward) for name, forward in each.items()} for each in turns]
    times: list[dict[str, list[float]]] = [defaultdict(list) for _ in turns]
    count, taken = _TIMES[1], 0
    with run.ready(model):
        while taken < count + _WARM_UP:
            for each, forwards in zip(times, timing, strict=True):
                totals.clear()
                start = clock()
                with _forwards(model, forwards):
                    run.call(model)
                totals[""] = clock() - start
                for name, seconds in totals.items():
                    each[name].append(seconds)
            taken += 1
            if taken == _WARM_UP:
                once = sum(each[""][-1] for each in times)
                count = min(max(round(_SECONDS / max(once, 1e-9)), _TIMES[0]), _TIMES[1])
    return [{name: statistics.median(each[_WARM_UP:]) for name, each in one.items()} for one in times]


@contextmanager
def _forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Lets modules compute something else inside."""
    with ExitStack() as undo:
        for name, forward in forwards.items():
            module = model.get_submodule(name)
            undo.callback(module.__dict__.pop, "forward")
            module.__dict__["forward"] = forward
        yield
