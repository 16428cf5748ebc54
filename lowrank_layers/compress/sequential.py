"""Fitting layers one after the other, each to the dense model's outputs on what the compressed prefix delivers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibrate import DataRows, masked_input_rows, quiet_eval
from ..calibrate.clipping import clipped
from ..calibrate.moments import sums
from ..calibrate.patch_moments import patch_sums
from ..calibrate.processes import Processes
from ..calibrate.readable import Unread
from ..calibrate.staged_calibration import without_cache
from ..calibrate.statistics import LayerStats, Statistics
from ..errors import LowRankError
from ..layers import ConvNd, bias_of, is_embedding, matrices_of, takes_bias, weight_of
from ..memory import in_memory, release_freed, spilled
from .anchoring import anchored
from .build import build_layer, refit, write_
from .paired_moments import PairedMoments, Sums
from .planned_layers import PlannedLayers
from .rectified import ENTRIES, ROWS, Rectifier, build_rectified, rectifier_of
from .regression import Metric
from .side_by_side import SideBySide

HELD_OUT = 4
"""One batch out of so many is held out, to choose how far layers follow the dense model."""
LARGE = 1 << 26
"""Bytes of a moment from which on memory that the passes have freed is given back before the fit."""


@dataclass
class Seen:
    """What is known of a layer before it is fitted.

    Args:
        stats: its statistics, behind the compressed prefix.
        rectifier: what cuts off its outputs, where it is fitted behind that.
        rows: rows of its inputs in both models, for that.
        outputs: the metrics of its outputs, group by group, where they were needed already.
    """

    stats: LayerStats | None
    rectifier: Rectifier | None = None
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Metric | None] | None = None


Keep = Callable[[str, Callable[[], Seen], Callable[[Seen], nn.Module]], nn.Module]
"""``keep(name, look, make) -> layer``: called for each layer in forward order; calls ``make(look())``, or finds what
was made before."""


def build_in_sequence(
    model: nn.Module,
    plan: PlannedLayers,
    stats: Statistics,
    batches: Sequence[Any],
    rectified: bool,
    progress: bool,
    keep: Keep = lambda name, look, make: make(look()),
    processes: Processes | None = None,
    folder: Path | None = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, nn.Module]:
    """Returns the layers of a plan, built in forward order, and dense ones with new values.

    Args:
        model: the dense model, its attentions opened; not changed.
        plan: what its layers become.
        stats: the statistics of the dense model.
        batches: what the dense and the compressed model are run on.
        rectified: whether layers are fitted behind ReLUs.
        progress: shows a progress bar.
        keep: what is done with each new layer.
        processes: those that have a part of the batches each, and all call this; ``None`` for this one alone.
        folder: where large tensors wait that are not needed while a layer is fitted; ``None`` keeps them in memory.
        kept: what stays in groups of layers, by their leaders. All layers of a group are built with the sizes that they
            had; these do without the other units.
    """
    built: dict[str, nn.Module] = {}
    names = [entry.name for entry in plan if entry.name in stats]
    passes = SideBySide(model, names, batches, stats.with_target, stats.mask, stats.example, folder)
    with quiet_eval(model), without_cache(model), passes:
        order = [*passes.calls, *(entry.name for entry in plan if entry.name not in passes.calls)]
        paired = _Paired(passes, len(batches), stats.clip, processes or Processes(), folder)

        def look(name: str, prefix_changed: bool) -> Seen:
            seen = Seen(stats.get(name))
            if rectified and plan[name].is_replaced and seen.stats is not None and name in passes.calls:
                seen.rectifier = _rectifier(model, name, batches[0], stats.with_target)
            if seen.stats is not None and (prefix_changed or seen.rectifier is not None):
                rows = None if seen.rectifier is None else seen.rows
                layer, bias = model.get_submodule(name), plan[name].bias and plan[name].is_replaced
                seen.stats, held_out = paired.stats(name, layer, seen.stats, rows)
                if held_out is not None and not rows:
                    seen.stats = anchor(layer, seen, held_out, bias_of(layer) is not None or bias) or stats[name]
            return seen

        def anchor(layer: nn.Module, seen: Seen, held_out: PairedMoments, has_bias: bool) -> LayerStats | None:
            assert seen.stats is not None
            weight, damping = weight_of(layer), plan.damping
            damping = plan[name].group.damping(damping) if name in kept else damping
            groups = [seen.stats.group(k) for k in range(len(matrices_of(layer)))]
            seen.outputs = [Metric.of_outputs(group, damping, weight.device) for group in groups]
            found = anchored(layer, seen.stats, held_out, damping, seen.outputs, has_bias=has_bias)
            cross = None if found is None else vars(found)["cross"]
            if folder is not None and isinstance(cross, Tensor) and cross.nbytes > LARGE:
                assert found is not None
                found.cross = _in_file(cross, folder)
            return found

        def replaced(name: str, seen: Seen) -> nn.Module:
            entry, dense = plan[name], model.get_submodule(name)
            with passes.own_forward(name):
                if name in kept and seen.stats is not None:
                    return entry.group.reduced(name, dense, seen.stats, plan.damping, kept[name], seen.outputs)
                if seen.stats is None or seen.rectifier is None or not seen.rows:
                    return build_layer(dense, entry, seen.stats, plan.damping, seen.outputs).eval()
                return build_rectified(dense, entry, seen.stats, plan.damping, seen.rectifier, seen.rows).eval()

        def refitted(name: str, seen: Seen) -> nn.Module:
            assert seen.stats is not None
            dense = model.get_submodule(name)
            with passes.own_forward(name):
                fitted = copy.deepcopy(dense)
                write_(fitted, *refit(dense, seen.stats, plan.damping))
            return fitted

        for name in tqdm(order, desc="factorize", disable=not progress):
            prefix_changed = bool(built) and name in passes.calls and not is_embedding(model.get_submodule(name))
            make = replaced if plan[name].is_replaced or name in kept else refitted
            if make is replaced or (name in stats and prefix_changed):
                built[name] = keep(name, partial(look, name, prefix_changed), partial(make, name))
            passes.decided[name] = built.get(name)
    return built


def _rectifier(model: nn.Module, name: str, batch: Any, with_target: bool) -> Rectifier | None:
    """Returns what cuts off a layer's outputs; ``None`` for nothing, and for layers that are not fitted behind it."""
    layer = model.get_submodule(name)
    if not takes_bias(layer) or len(matrices_of(layer)) != 1:
        return None
    return rectifier_of(model, name, batch, with_target=with_target)


class _Paired:
    """Moments of a layer's inputs in the dense model and behind the compressed prefix.

    Args:
        passes: both.
        count: the number of batches.
        clip: as in :func:`calibrate`.
        processes: those that have a part of the batches each.
        folder: where large moments wait until the next layer, which may share them; ``None`` keeps them in memory.
    """

    def __init__(
        self, passes: SideBySide, count: int, clip: float | None, processes: Processes, folder: Path | None
    ) -> None:
        self._passes, self._count, self._clip, self._processes, self._folder = passes, count, clip, processes, folder
        self._whole = sum(processes.gather(count))
        self._last: tuple[str, LayerStats, PairedMoments | None] | None = None

    def stats(
        self, name: str, layer: nn.Module, stats: LayerStats, kept: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[LayerStats, PairedMoments | None]:
        """Returns ``E[x' x'^T]`` and ``E[x x'^T]`` of a layer: ``x`` in the dense model, ``x'`` in the compressed one.

        Padding is left out, as :func:`calibrate` does. Where the two models route rows differently, so that they cannot
        be paired, the statistics come back as they were.

        Args:
            name: the layer.
            layer: the dense layer.
            stats: its statistics in the dense model.
            kept: a list to which some rows of inputs in both models are added.
        """
        is_linear = not isinstance(layer, ConvNd) and not is_embedding(layer)
        if is_linear and kept is None and self._last and self._passes.have_same_inputs(name, self._last[0]):
            _, same, held_out = self._last
            return stats.changed(inputs=same.inputs, cross=vars(same)["cross"], target_mean=same.target_mean), held_out
        self._last = None
        is_large = math.prod(vars(stats.inputs)["second"].shape) * 8 > LARGE
        both = PairedMoments.before_any(stats.inputs)
        # only a choice hangs on these, for which fp32 is enough
        held_out = PairedMoments.before_any(stats.inputs, torch.float32 if is_large else None)

        def keep_some(rows: Tensor, rows_dense: Tensor) -> None:
            assert kept is not None
            chosen = slice(None, None, stats.inputs.rows // min(ROWS, ENTRIES // rows.shape[-1]) | 1)
            kept.append((rows[chosen].clone(), rows_dense[chosen].clone()))

        keep, apart = None if kept is None else keep_some, False
        for index in range(self._count):
            ours, theirs = (self._passes.inputs(name, index, kind) for kind in ("compressed", "dense"))
            apart = [x.shape for x, _ in ours] != [x.shape for x, _ in theirs]
            if apart:
                break
            for (x, found), (x_dense, _) in zip(ours, theirs, strict=True):
                out = self._is_held_out(index)
                for own_sums, across, count, is_out in _products(layer, x, x_dense, found, self._clip, keep, out):
                    both.add(own_sums, across, count)
                    if is_out:
                        held_out.add(own_sums, across, count)
                    del own_sums, across  # before the next ones are taken
        if any(self._processes.gather(apart)):
            if kept is not None:
                kept.clear()
            return stats, None
        for each in (both, held_out):
            each.average_(self._processes)
        if not both.is_finite:
            raise LowRankError(f"{name!r}: got NaN or Inf in its inputs; look at the batches in data.")
        inputs, target_mean = both.inputs, both.target_mean
        cross = both.cross.addcmul_(target_mean[..., :, None], inputs.mean[..., None, :], value=-1)
        known = held_out if 0 < held_out.inputs.rows < inputs.rows else None
        large = cross.nbytes > LARGE
        own = stats.changed(inputs=inputs, cross=cross, target_mean=target_mean)
        if large and self._folder is not None:
            for moments, field in (
                (inputs, "second"),
                (own, "cross"),
                (held_out.inputs, "second"),
                (held_out, "cross"),
            ):
                setattr(moments, field, _in_file(vars(moments)[field], self._folder))
        self._last = (name, own, known) if is_linear else None
        del cross, both
        if large:
            release_freed()
        return own, known

    def _is_held_out(self, index: int) -> bool | None:
        """Whether a batch is held out; ``None`` where it is the only one. Processes have batches by turns."""
        if self._whole == 1:
            return None
        place = index * self._processes.count + self._processes.rank
        return place % HELD_OUT == min(HELD_OUT, self._whole) - 1


def _in_file(moment: Tensor, folder: Path) -> Unread:
    """A moment that is in a file until somebody asks for it."""
    return Unread(tuple(moment.shape), partial(in_memory, spilled(moment, folder)))


def _products(
    layer: nn.Module,
    x: Tensor,
    x_dense: Tensor,
    found: DataRows | None,
    clip: float | None,
    keep: Callable[[Tensor, Tensor], None] | None,
    out: bool | None,
) -> Iterator[tuple[Sums, Sums, int, bool]]:
    """Yields sums over rows ``x'`` and ``x`` of a layer's inputs, the number of rows, and whether they are held out.

    Sums of ``x'`` and of ``x' x'^T``, and sums of ``x`` and of ``x x'^T``.

    Args:
        layer: the layer.
        x: its input behind the compressed prefix.
        x_dense: its input in the dense model.
        found: which rows are data.
        clip: how long rows ``x`` may be, over the median of their lengths; longer ones are scaled down, with their
            ``x'`` by the same factor.
        keep: called with the rows.
        out: whether they are held out; ``None`` holds out the last ones alone.
    """
    if keep is None and found is None and out is not None:
        own, across = patch_sums(layer, x), patch_sums(layer, x_dense, x)
        if own is not None and across is not None:
            yield own[:2], across[:2], own[2], out
            return
    pairs = zip(masked_input_rows(layer, x, found), masked_input_rows(layer, x_dense, found), strict=True)
    for rows, rows_dense in pairs:
        if rows.shape[-2]:
            rows_dense, rows = clipped(layer, clip, rows_dense, rows)
            if keep is not None:
                keep(rows, rows_dense)
            last = rows.shape[-2] // HELD_OUT if out is None else 0
            for part, is_out in ((slice(rows.shape[-2] - last), bool(out)), (slice(rows.shape[-2] - last, None), True)):
                some, others = rows[..., part, :], rows_dense[..., part, :]
                if some.shape[-2]:
                    yield sums(some), sums(some, others), some.shape[-2], is_out
