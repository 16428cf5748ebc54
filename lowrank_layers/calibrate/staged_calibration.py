"""Calibration with the moments of one stage in memory at a time, and those of the others in files.

All batches go forward stage by stage, without a graph inside the stages. Under a loss they come back from the last one
to the first: each stage is run again, its layers' inputs and gradients are taken, its file is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import LowRankError
from ..layers import weight_of
from ..modules import Selector, opened_attentions, walk_layers
from .batch_masks import MaskOf
from .example import first_sample
from .padding import Padding
from .result_checks import check_gradients, check_seen
from .run import Loss, frozen, quiet_eval
from .shared_inputs import SharedInputs
from .stage_files import fingerprint_of, stage_files
from .staged_forward import StagedForward
from .staged_schedule import take_gradients, take_inputs
from .stages import find_stages
from .statistics import Statistics
from .watched import watched_layers

THREADS = 1 << 14
"""Threads that the passes of all batches may have: OpenMP gives each one that computes a pool of its own."""


def calibrate_in_stages(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    folder: str | os.PathLike[str],
    stages: Iterable[Selector] | None = None,
    target: Iterable[Selector] | None = None,
    mask: MaskOf | None = None,
    clip: float | None = None,
    progress: bool = False,
    after_stage: Callable[[str], object] | None = None,
    dtype: torch.dtype = torch.float64,
    sketch_above: int | None = None,
) -> Statistics:
    """Returns what :func:`calibrate` does, with the moments in files of a folder, one for each stage.

    A stage whose file is there already is run and not recorded again.

    Args:
        model: as in :func:`calibrate`.
        batches: as in :func:`calibrate`.
        loss: as in :func:`calibrate`.
        folder: a folder, which is made where it does not exist.
        stages: as in :func:`find_stages`.
        target: as in :func:`calibrate`.
        mask: as in :func:`calibrate`.
        clip: as in :func:`calibrate`.
        progress: shows a progress bar.
        after_stage: called with the name of a stage after it was run for all batches, each time.
        dtype: dtype of the moments in the files, as in :meth:`Statistics.save`, and of the sums of gradients; sums of
            inputs are taken in float64.
        sketch_above: as in :func:`calibrate`.

    Raises:
        LowRankError: as :func:`calibrate`; for a folder that holds statistics of something else; and for a stage that
            cannot be run again, because it changes its inputs in place, draws random numbers or keeps state.
    """
    batches = list(batches)
    check_seen(batches)
    path = Path(folder)
    if path.exists() != path.is_dir() or not path.absolute().parent.is_dir():
        raise LowRankError(
            f"calibrate: got folder={str(folder)!r}, expected a folder, or the path of a new one in a folder."
        )
    workers = max(1, torch.get_num_threads() - 1)
    if len(batches) * workers > THREADS:
        raise LowRankError(
            f"calibrate: got {len(batches)} batches, expected at most {THREADS // workers} with folder=; join some to"
            " larger ones, or calibrate parts of them and merge."
        )
    path.mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(quiet_eval(model))
        stack.enter_context(without_cache(model))
        closed = list(walk_layers(model))
        stack.enter_context(opened_attentions(model))
        stack.enter_context(frozen(model))
        layers, counted = watched_layers(model, target, closed)
        names = find_stages(model, stages)
        padding = stack.enter_context(Padding(model, mask))
        places = {name: model.get_submodule(name) for name in (*names, *layers)}
        shared = SharedInputs(layers)
        forward = stack.enter_context(StagedForward(model, places, counted, padding, shared, path))
        bar = stack.enter_context(tqdm(total=(1 if loss is None else 2) * len(names), disable=not progress))
        named = None if loss is None else getattr(loss, "__name__", type(loss).__name__)
        facts = _facts(loss, mask) | {"loss": named, "stages": names, "dtype": dtype}
        facts |= {"sketch": sketch_above, "clip": clip}
        fingerprint = fingerprint_of(batches, layers, facts)
        files = stage_files(path, places, layers, padding, shared, fingerprint, dtype, sketch_above, clip)

        def finish(stage: str) -> None:
            bar.set_description(f"calibrate {stage}")
            bar.update()
            if after_stage is not None:
                after_stage(stage)

        passes = [forward.start(batch, loss) for batch in batches]
        samples = sum(each.samples for each in passes)
        example = first_sample(batches[0], passes[0].samples)
        if loss is None:
            take_inputs(forward, passes, files, forward.count(example), finish)
        else:
            take_gradients(forward, passes, files, finish)
    stats = Statistics(
        samples=samples,
        with_target=loss is not None,
        mask=mask,
        clip=clip,
        example=example,
        watched=tuple(layers),
        loss=named,
        other_macs=round(sum(each.macs for each in passes) / max(1, samples)),
    )
    device = next((weight_of(layer).device for layer in layers.values()), torch.device("cpu"))
    found = {name: layer for file in set(files.values()) for name, layer in file.read(str(device)).items()}
    stats.layers = {name: found[name] for name in forward.order if name in found}
    check_seen(found)
    if loss is not None:
        with quiet_eval(model):
            check_gradients(model, batches[-1], loss, max(file.largest for file in files.values()))
    return stats


def _facts(loss: Loss | None, mask: MaskOf | None) -> dict[str, Any]:
    """What tells one loss, and one mask, from another one of its kind."""
    settings = {key: value for key, value in getattr(loss, "__dict__", {}).items() if isinstance(value, (int, float))}
    named = getattr(mask, "__name__", type(mask).__name__) if callable(mask) else repr(mask)
    return {**settings, "mask": named}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Lets no model of transformers keep keys and values inside.

    A stage that is run again would add its own twice, and passes that wait would hold those of all layers.
    """
    configs: dict[int, Any] = {
        id(config): config for module in model.modules() if (config := vars(module).get("config"))
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True
