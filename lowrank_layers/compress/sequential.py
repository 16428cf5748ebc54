"""Fitting layers one after the other, each to the dense model's outputs on what the compressed prefix delivers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibrate import (
    DataRows,
    MaskOf,
    Padding,
    as_batch,
    forward,
    layer_input,
    masked_input_rows,
    quiet_eval,
    target_of,
)
from ..calibrate.moments import sums
from ..calibrate.statistics import LayerStats, Statistics
from ..errors import LowRankError
from ..layers import is_embedding, matrices_of, takes_bias
from ..modules import replace_
from .build import build_layer, refit, write_
from .planned_layers import PlannedLayers
from .rectified import ENTRIES, ROWS, Rectifier, build_rectified, rectifier_of
from .registry import DENSE

Refit = tuple[Tensor, Tensor | None]
"""New weight and bias of a layer that stays dense."""


def build_in_sequence(
    model: nn.Module, plan: PlannedLayers, stats: Statistics, batches: Sequence[Any], rectified: bool, progress: bool
) -> tuple[dict[str, nn.Module], dict[str, Refit]]:
    """Returns the layers of a plan, built in forward order on a copy of the model, and new values for dense ones.

    Args:
        model: the dense model, its attentions opened; not changed.
        plan: what its layers become.
        stats: the statistics of the dense model.
        batches: what both models are run on.
        rectified: whether layers are fitted behind ReLUs.
        progress: shows a progress bar.
    """
    work = copy.deepcopy(model).requires_grad_(False)
    pair = _Pair(model, work, batches, stats.with_target, stats.mask)
    calls = pair.calls([entry.name for entry in plan if entry.name in stats])
    built: dict[str, nn.Module] = {}
    refits: dict[str, Refit] = {}
    with quiet_eval(model), quiet_eval(work):
        order = [*calls, *(entry.name for entry in plan if entry.name not in calls)]
        for name in tqdm(order, desc="factorize", disable=not progress):
            entry, dense, known = plan[name], model.get_submodule(name), stats.get(name)
            prefix_changed = bool(built) and name in calls and not is_embedding(dense)
            rows: list[tuple[Tensor, Tensor]] = []
            tried = rectified and known is not None and name in calls and entry.method != DENSE
            rectifier = pair.rectifier(name) if tried else None
            if known is not None and (prefix_changed or rectifier is not None):
                known = pair.stats(name, known, calls[name], None if rectifier is None else rows)
            if entry.method != DENSE:
                if known is None or rectifier is None or not rows:
                    built[name] = build_layer(dense, entry, known, plan.damping)
                else:
                    built[name] = build_rectified(dense, entry, known, plan.damping, rectifier, rows)
                replace_(work, {name: copy.deepcopy(built[name]).requires_grad_(False).eval()})
            elif known is not None and prefix_changed:
                refits[name] = refit(dense, known, plan.damping)
                write_(work.get_submodule(name), *refits[name])
    return built, refits


class _Reached(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass(frozen=True)
class _Pair:
    """The dense model and the copy whose layers are compressed one by one, run on the same batches.

    Args:
        dense: the dense model.
        work: the copy.
        batches: what both are run on.
        with_target: whether the last item of a tuple batch is the target.
        mask: how the padding of a batch is found.
    """

    dense: nn.Module
    work: nn.Module
    batches: Sequence[Any]
    with_target: bool
    mask: MaskOf | None

    def rectifier(self, name: str) -> Rectifier | None:
        """Returns what cuts off a layer's outputs; ``None`` for nothing, and for layers that are not fitted behind it.

        Args:
            name: the layer.
        """
        layer = self.dense.get_submodule(name)
        if not takes_bias(layer) or len(matrices_of(layer)) != 1:
            return None
        return rectifier_of(self.dense, name, self.batches[0], with_target=self.with_target)

    def calls(self, names: Sequence[str]) -> dict[str, int]:
        """Returns how often each layer is called for one batch, in the order of their first calls."""
        calls: dict[str, int] = {}

        def count(name: str) -> Any:
            def hook(*_: object) -> None:
                calls[name] = calls.get(name, 0) + 1

            return hook

        hooks = [self.dense.get_submodule(name).register_forward_hook(count(name)) for name in names]
        try:
            with torch.no_grad(), quiet_eval(self.dense):
                forward(self.dense, self.batches[0], with_target=self.with_target)
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def stats(self, name: str, stats: LayerStats, calls: int, kept: list[tuple[Tensor, Tensor]] | None) -> LayerStats:
        """Returns ``E[x' x'^T]`` and ``E[x x'^T]`` of a layer: ``x`` in the dense model, ``x'`` in the compressed one.

        Padding is left out, as :func:`calibrate` does. Where the two models route rows differently, so that they cannot
        be paired, the statistics come back as they were.

        Args:
            name: the layer.
            stats: its statistics in the dense model.
            calls: how often it is called for one batch.
            kept: a list to which some rows of inputs in both models are added.
        """
        layer = self.dense.get_submodule(name)
        inputs = replace(stats.inputs, mean=stats.inputs.mean * 0, second=stats.inputs.second * 0, rows=0)
        target_mean = torch.zeros_like(inputs.mean)
        cross = torch.zeros_like(inputs.second)
        for batch in self.batches:
            ours, theirs = (self._inputs(model, name, batch, calls) for model in (self.work, self.dense))
            if [x.shape for x, _ in ours] != [x.shape for x, _ in theirs]:
                if kept is not None:
                    kept.clear()
                return stats
            for (x, found), (x_dense, _) in zip(ours, theirs, strict=True):
                for rows, rows_dense in zip(
                    masked_input_rows(layer, x, found), masked_input_rows(layer, x_dense, found), strict=True
                ):
                    count = rows.shape[-2]
                    if not count:
                        continue
                    if kept is not None:
                        chosen = slice(None, None, stats.inputs.rows // min(ROWS, ENTRIES // rows.shape[-1]) | 1)
                        kept.append((rows[chosen].clone(), rows_dense[chosen].clone()))
                    inputs.update(rows)
                    share = count / inputs.rows
                    total, products = sums(rows, rows_dense)
                    target_mean.lerp_(total.to(target_mean) / count, share)
                    cross.lerp_(products.to(cross) / count, share)
        if not bool(torch.isfinite(cross).all() & torch.isfinite(inputs.second).all()):
            raise LowRankError(f"{name!r}: got NaN or Inf in its inputs; look at the batches in data.")
        cross = cross - target_mean[..., :, None] * inputs.mean[..., None, :]
        return replace(stats, inputs=inputs, cross=cross, target_mean=target_mean)

    def _inputs(self, model: nn.Module, name: str, batch: Any, calls: int) -> list[tuple[Tensor, DataRows | None]]:
        """The inputs of a layer, call by call; the forward pass ends at the last one."""
        seen: list[tuple[Tensor, DataRows | None]] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs)
            batched = as_batch(module, x.detach())
            seen.append((batched, padding.of(module, x, batched)))
            if len(seen) == calls:
                raise _Reached

        handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad(), Padding(model, self.mask) as padding:
                padding.start(batch, target_of(batch) if self.with_target else None)
                forward(model, batch, with_target=self.with_target)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen
