"""From a checkpoint that may be larger than memory to its compressed form, stage by stage and resumable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate import Loss, MaskOf, SampledCrossEntropy, check_batches, is_calibrated
from ..calibrate.clipping import check_clip
from ..calibrate.processes import Processes
from ..calibrate.sketch import COLUMNS, check_sketch_above, is_sketched
from ..calibrate.staged_calibration import calibrate_in_stages
from ..calibrate.statistics import Statistics
from ..compress import Damping, GroupMethod, Method, Plan, make_plan
from ..compress.grouped import kept_units
from ..compress.methods import HiddenUnitsMethod
from ..compress.registry import refuse_group_methods, usual_methods
from ..compress.sequential import build_in_sequence
from ..compress.units import Units
from ..errors import LowRankError
from ..layers import is_embedding, linear_shape
from ..linalg import half_products_in_fp32, halves_are_slow
from ..memory import release_freed, release_mapped
from ..modules import Selector, opened_attentions, reasons_to_keep, select, walk_layers
from ..rank import Budget
from .group_files import cut_to_files_, kept_in_file
from .layer_store import LayerStore
from .mapped_model import fill_from_files_
from .run_folder import begin, digest_of, end, facts_of
from .tensor_files import Checkpoint
from .transformers_model import transformers_model
from .write_model import put_in_place_, write_model

SKETCH_ABOVE = 8192
"""Outputs of a layer above which the moment of its gradients is sketched."""


def compress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    budget: Budget,
    batches: Iterable[Any],
    *,
    model: nn.Module | None = None,
    loss: Loss | None = None,
    methods: Sequence[Method | GroupMethod] | None = None,
    skip: Iterable[Selector] = (),
    units: Units | None = None,
    damping: Damping | None = None,
    mask: MaskOf | None = None,
    sketch_above: int | None = SKETCH_ABOVE,
    clip: float | None = None,
    progress: bool = False,
) -> Plan:
    """Compresses the weights in a folder into another folder, without ever holding the model in memory.

    It calibrates with gradients, plans under the budget and fits the layers in sequence, as :func:`calibrate`,
    :func:`make_plan` and :func:`factorize_` do. Weights stay in the files of the source, and moments and finished
    layers in files of the target, until they are looked at; a stage of the model (a transformer block) is touched for
    all batches before the next one. In memory are the activations of all batches at one place, and the moments of one
    stage. The embedding of a vocabulary and the layer that puts one out stay as they are.

    Under ``torchrun`` (with ``torch.distributed`` initialized) every process calls it with a part of the batches and
    the same folders, which all have to see. Moments are added up over processes, and the first one fits the layers. A
    loss that draws random numbers then needs a seed of its own in each, as in ``SampledCrossEntropy(seed=rank)``.

    A run that was killed goes on where it was if it is called again with the same arguments, and ends in the same
    bytes. The target is complete once it has ``model.safetensors`` or its index; :func:`load` reads the folder.

    Args:
        source: a folder or file of weights, such as a model's folder of transformers, sharded or not.
        target: the folder to write, new, empty or of a run that was killed. Small files beside the weights
            (configuration, tokenizer) are copied.
        budget: the limits, as in :func:`make_plan`.
        batches: what the model is calibrated on: all the data that :func:`calibrate` takes, in the same form.
        model: the model with parameters on the meta device; ``None`` builds the one that ``config.json`` of
            transformers names.
        loss: as in :func:`calibrate`; ``None`` is ``SampledCrossEntropy()``, which needs no targets.
        methods: as in :func:`make_plan`, by default those of single layers. :class:`HiddenUnitsMethod` competes where
            it is named too, ``methods=[*lr.METHODS.values(), lr.HiddenUnitsMethod()]``; :class:`AttentionHeadsMethod`
            is not possible.
        skip: layers to leave alone, as in :func:`make_plan`.
        units: as in :func:`make_plan`. ``"measured"`` runs the model from each layer on, with weights from the files.
        damping: as in :func:`make_plan`.
        mask: how the padding of a batch is found, as in :func:`calibrate`.
        sketch_above: as in :func:`calibrate`.
        clip: how long rows of inputs may be, as in :func:`calibrate`.
        progress: shows progress bars.

    Returns:
        The plan, which is also written to the target as ``plan.json``.

    Raises:
        CheckpointError: for weights that do not fit the model, a target that holds something else, and a disk without
            enough space, before anything is written.
        LowRankError: as :func:`calibrate` and :func:`make_plan`.
        MissingExtraError: without a model, if transformers is not installed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> lr.save(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)), folder / "dense.safetensors")
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        >>> batches, budget = [torch.randn(100, 64)], lr.Budget(params=0.5)
        >>> plan = lr.compress_checkpoint(folder / "dense.safetensors", folder / "small", budget, batches, model=model)
        >>> dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        >>> type(lr.load(folder / "small", into=dense)[0]).__name__
        'PivotLinear'
    """
    check_batches(batches, "compress_checkpoint")
    refuse_group_methods(methods, "compress_checkpoint", HiddenUnitsMethod)
    check_clip(clip)
    check_sketch_above(sketch_above, "compress_checkpoint")
    batches, processes = list(batches), Processes.all()
    if not all(processes.gather(len(batches))):
        raise LowRankError("compress_checkpoint: got no batches.")
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint(source)
    model = transformers_model(source) if model is None else model
    fill_from_files_(model, checkpoint).eval()
    with opened_attentions(model):
        left = _left_alone(model, skip)
        sizes = _moments(model, left, sketch_above)
    asked: dict[str, Any] = {"budget": repr(budget), "layers": sorted(sizes), "units": units, "methods": repr(methods)}
    asked |= {"loss": repr(loss if loss is None else getattr(loss, "__name__", type(loss))), "damping": repr(damping)}
    asked |= {"sketch_above": sketch_above, "clip": clip, "mask": mask if isinstance(mask, str) else repr(type(mask))}
    asked |= {"weights": facts_of(checkpoint), "batches": processes.gather(digest_of(batches))}
    work = processes.from_first(partial(begin, target, asked, model, sum(sizes.values()) * processes.count))
    moments, planned = work / "stats.safetensors", work / "plan.json"
    parts = [work / f"stats-{rank}.safetensors" for rank in range(processes.count)]
    own, stages = parts[processes.rank], work / f"stages-{processes.rank}"
    slow = halves_are_slow()
    if not processes.from_first(moments.is_file) and not own.is_file():
        with half_products_in_fp32(slow):
            stats = calibrate_in_stages(
                model,
                batches,
                SampledCrossEntropy(seed=processes.rank) if loss is None else loss,
                folder=stages,
                target=[lambda name, _: name in sizes],
                mask=mask,
                clip=clip,
                progress=progress,
                dtype=torch.float32,
                sketch_above=sketch_above,
                after_stage=lambda name: _release(model.get_submodule(name)),
            )
        stats.mask = None
        stats.save(own, dtype=torch.float32)
    shutil.rmtree(stages, ignore_errors=True)
    release_freed()

    def decide() -> None:
        if not moments.is_file():
            first, *others = (Statistics.load(part) for part in parts)
            if others:
                first.merge(*others).save(moments, dtype=torch.float32)
            else:
                parts[0].rename(moments)
        for part in parts:
            part.unlink(missing_ok=True)
        if not planned.is_file():
            known = Statistics.load(moments)
            settings: Any = {"units": units, "damping": damping, "progress": progress}
            settings["batches"] = batches if units == "measured" else None
            make_plan(model, budget, known, usual_methods() if methods is None else methods, left, **settings).save(
                planned
            )

    processes.gather(None)  # all have written their part
    processes.from_first(decide)
    plan, stats = Plan.load(planned), Statistics.load(moments)
    stats.mask = mask
    layers = work / "layers"
    layers.mkdir(exist_ok=True)
    store = LayerStore(layers, model, processes)
    with opened_attentions(model), half_products_in_fp32(slow):
        grouped = any(entry.is_grouped for entry in plan)
        find = partial(kept_units, model, plan, stats)
        kept = kept_in_file(work / "units.safetensors", find, processes) if grouped else {}
        built = build_in_sequence(model, plan, stats, batches, False, progress, store.keep, processes, layers, kept)
    put_in_place_(model, built)

    def finish() -> None:
        cut_to_files_(model, plan, kept, layers)
        write_model(model, target, source, plan)
        end(target)

    processes.from_first(finish)
    return plan


def _release(stage: nn.Module) -> None:
    """Lets go of what a stage needed."""
    release_mapped(stage.parameters())
    release_freed()


def _left_alone(model: nn.Module, skip: Iterable[Selector]) -> set[str]:
    """Layers that are skipped as asked, and those from and to a vocabulary, which take more memory than all others."""
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    asked = select(model, skip, "compress_checkpoint: skip")
    return asked | {name for name, layer in walk_layers(model) if any(layer is end for end in ends)}


def _moments(model: nn.Module, left: set[str], sketch_above: int | None) -> dict[str, int]:
    """How many numbers the moments of each layer have that may change."""
    left = left | set(reasons_to_keep(model))
    found = {}
    for name, layer in walk_layers(model):
        if name not in left and is_calibrated(layer):
            groups, outputs, inputs = linear_shape(layer)
            wide = is_sketched(outputs, sketch_above)
            gradients = outputs * (1 + COLUMNS) if wide else outputs**2
            found[name] = groups * (gradients + (inputs if is_embedding(layer) else inputs**2))
    return found
