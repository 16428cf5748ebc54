"""Adding up the statistics that several parts of the data gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from ..errors import LowRankError
from .layer_stats import LayerStats
from .moments import Moments
from .readable import Unread, Value, read

Add = Callable[[Sequence[Value], Sequence[float]], Value]
"""Returns the sum of the values, each times its weight."""


def weighted_sum(values: Sequence[Value], weights: Sequence[float]) -> Value:
    """Returns the sum of the values, each times its weight; one that is read anew each time if a value is.

    Args:
        values: tensors of one shape.
        weights: one number per value.
    """
    if any(isinstance(value, Unread) for value in values):
        return Unread(tuple(values[0].shape), partial(_sum, values, weights))
    return _sum(values, weights)


def merge_layers(
    parts: Sequence[Mapping[str, LayerStats]], samples: Sequence[int], add: Add = weighted_sum
) -> dict[str, LayerStats]:
    """Returns the statistics of every layer over all parts of the data.

    Moments are averaged by the rows that went in. Layers that shared their moments in every part share the result.

    Args:
        parts: the statistics by layer that each part gave; a part may lack layers that were not called.
        samples: the number of samples of each part.
        add: adds up tensors.

    Raises:
        LowRankError: for a layer whose shapes differ between parts.
    """
    known: dict[tuple[int, ...], Moments] = {}
    merged: dict[str, LayerStats] = {}
    names = dict.fromkeys(name for part in parts for name in part)
    for name in names:
        _check(name, [part[name] for part in parts if name in part])
    for name in names:
        own = [(part[name], count) for part, count in zip(parts, samples, strict=True) if name in part]
        layers, counts = [layer for layer, _ in own], [count / sum(samples) for _, count in own]
        inputs = [layer.inputs for layer in layers]
        key = tuple(map(id, inputs))
        if key not in known:
            known[key] = _merge_moments(inputs, add)
        merged[name] = _merge_layer(layers, counts, known[key], add)
    return merged


def _merge_moments(parts: Sequence[Moments], add: Add) -> Moments:
    rows = [part.rows for part in parts]
    mean, second = (add([vars(part)[name] for part in parts], _shares(rows)) for name in ("mean", "second"))
    return Moments(mean, second, sum(rows))


def _merge_layer(layers: Sequence[LayerStats], counts: Sequence[float], inputs: Moments, add: Add) -> LayerStats:
    """The statistics of one layer; ``counts`` are each part's share in all samples."""
    reached = [layer for layer in layers if vars(layer)["gradients"] is not None]
    rows = [layer.inputs.rows if layer.gradient_rows is None else layer.gradient_rows for layer in reached]
    first = next((layer for layer in layers if layer.repeats), layers[0])  # whose input shape a whole run would keep
    taken = sum(layer.repeats * layer.rows_per_input * count for layer, count in zip(layers, counts, strict=True))
    return LayerStats(
        inputs,
        add([vars(layer)["gradients"] for layer in reached], _shares(rows)) if reached else None,
        first.input_shape,
        positions=sum(layer.positions * count for layer, count in zip(layers, counts, strict=True)),
        repeats=taken / first.rows_per_input,
        traced=any(layer.traced for layer in layers),
        free_bias=all(layer.free_bias for layer in layers),
        rows_per_input=first.rows_per_input,
        gradient_rows=sum(rows) if reached else None,
    )


def _check(name: str, layers: Sequence[LayerStats]) -> None:
    """Raises unless the tensors of all parts have the same shapes."""
    for kind in ("mean", "second", "gradients"):
        values = [vars(layer if kind == "gradients" else layer.inputs)[kind] for layer in layers]
        shapes = dict.fromkeys(tuple(value.shape) for value in values if value is not None)
        if len(shapes) > 1:
            raise LowRankError(
                f"merge: got {kind} of the shapes {' and '.join(map(str, shapes))} for the layer {name!r}; statistics"
                " of different models do not add up."
            )
    if any(vars(layer)[kind] is not None for layer in layers for kind in ("cross", "target_mean")):
        raise LowRankError(f"merge: {name!r} has moments between two models (cross=), expected what calibrate returns.")


def _shares(rows: Sequence[int]) -> list[float]:
    return [count / max(1, sum(rows)) for count in rows]


def _sum(values: Sequence[Value], weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=True):
        total = read(value) * weight if total is None else total.add_(read(value).to(total), alpha=weight)
    assert total is not None
    return total
