"""Statistics of one layer on the already compressed prefix, against the dense model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Kept, MaskOf, Padding, as_batch, data_rows, forward, layer_input, quiet_eval, target_of
from ..calibrate.moments import sums
from ..calibrate.statistics import LayerStats
from ..errors import LowRankError


class _Reached(Exception):
    """No error: ends a forward pass that has gone far enough."""


def forward_order(model: nn.Module, names: Sequence[str], batch: Any, *, with_target: bool) -> dict[str, int]:
    """The layers in the order of their first call, and how often each one is called."""
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(count(name)) for name in names]
    try:
        with torch.no_grad(), quiet_eval(model):
            forward(model, batch, with_target=with_target)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def paired_stats(
    dense: nn.Module,
    work: nn.Module,
    name: str,
    stats: LayerStats,
    batches: Sequence[Any],
    *,
    calls: int,
    with_target: bool,
    mask: MaskOf | None = None,
) -> LayerStats:
    """``E[x' x'^T]`` and ``E[x x'^T]`` of one layer, ``x`` in the dense model and ``x'`` in the compressed one.

    Padding is left out, as :func:`calibrate` does. Both forward passes stop at the layer. Where the two models route
    rows differently (so that they cannot be paired), the statistics come back as they were.
    """
    layer = dense.get_submodule(name)
    inputs = replace(stats.inputs, mean=stats.inputs.mean * 0, second=stats.inputs.second * 0, rows=0)
    target_mean = torch.zeros_like(inputs.mean)
    cross = torch.zeros_like(inputs.second)
    for batch in batches:
        ours = _inputs(work, name, batch, calls, with_target, mask)
        theirs = _inputs(dense, name, batch, calls, with_target, mask)
        if [x.shape for x, _ in ours] != [x.shape for x, _ in theirs]:
            return stats
        for (x, kept), (x_dense, _) in zip(ours, theirs, strict=True):
            for rows, rows_dense in zip(data_rows(layer, x, kept), data_rows(layer, x_dense, kept), strict=True):
                count = rows.shape[-2]
                if not count:
                    continue
                inputs.update(rows)
                share = count / inputs.rows
                total, products = sums(rows, rows_dense)
                target_mean.lerp_(total.to(target_mean) / count, share)
                cross.lerp_(products.to(cross) / count, share)
    if not bool(torch.isfinite(cross).all() & torch.isfinite(inputs.second).all()):
        raise LowRankError(f"{name!r}: got NaN or Inf in its inputs; look at the batches in data.")
    cross = cross - target_mean[..., :, None] * inputs.mean[..., None, :]
    return replace(stats, inputs=inputs, cross=cross, target_mean=target_mean)


def _inputs(
    model: nn.Module, name: str, batch: Any, calls: int, with_target: bool, mask: MaskOf | None
) -> list[tuple[Tensor, Kept | None]]:
    seen: list[tuple[Tensor, Kept | None]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        batched = as_batch(module, x.detach())
        seen.append((batched, padding.of(module, x, batched)))
        if len(seen) == calls:
            raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), Padding(model) as padding:
            padding.start(batch, mask, target_of(batch) if with_target else None)
            forward(model, batch, with_target=with_target)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen
