"""From a checkpoint that may be larger than memory to its compressed form, stage by stage and resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibrate import Loss, MaskOf, SampledCrossEntropy, check_batches, is_calibrated
from ..calibrate.sketch import COLUMNS, is_sketched
from ..calibrate.staged_calibration import calibrate_in_stages
from ..calibrate.statistics import Statistics
from ..compress import Damping, Method, Plan, make_plan
from ..compress.build import write_
from ..compress.sequential import build_in_sequence
from ..compress.units import Units
from ..errors import CheckpointError, LowRankError
from ..files import TensorInfo, check_folder, release_freed, release_mapped, replacing, write_streamed
from ..layers import bias_of, is_embedding, is_factored, linear_shape, weight_of
from ..modules import (
    ModelDescription,
    Selector,
    opened_attentions,
    reasons_to_keep,
    replace_,
    select,
    shared_names,
    walk_layers,
)
from ..rank import Budget
from .layer_store import LayerStore
from .mapped_model import fill_from_files_
from .model_file import KEY, VERSION
from .tensor_files import Checkpoint
from .transformers_model import transformers_model

WORK = ".lowrank_layers"
"""The folder, inside of the target, of what a run has done so far."""
SHARD = 5 << 30
"""Bytes of one file of weights, at most, where a single tensor is not larger."""


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
    methods: Sequence[Method] | None = None,
    skip: Iterable[Selector] = (),
    units: Units | None = None,
    damping: Damping | None = None,
    mask: MaskOf | None = None,
    sketch_above: int | None = SKETCH_ABOVE,
    progress: bool = False,
) -> Plan:
    """Compresses the weights in a folder into another folder, without ever holding the model in memory.

    It calibrates with gradients, plans under the budget and fits the layers in sequence, as :func:`calibrate`,
    :func:`make_plan` and :func:`factorize_` do. Weights stay in the files of the source, and moments and finished
    layers in files of the target, until they are looked at; a stage of the model (a transformer block) is touched for
    all batches before the next one. In memory are the activations of all batches at one place, and the moments of one
    stage. The embedding of a vocabulary and the layer that puts one out stay as they are.

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
        methods: as in :func:`make_plan`.
        skip: layers to leave alone, as in :func:`make_plan`.
        units: as in :func:`make_plan`.
        damping: as in :func:`make_plan`.
        mask: how the padding of a batch is found, as in :func:`calibrate`.
        sketch_above: as in :func:`calibrate`.
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
        'LowRankLinear'
    """
    check_batches(batches, "compress_checkpoint")
    batches = list(batches)
    if not batches:
        raise LowRankError("compress_checkpoint: got no batches.")
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint(source)
    model = transformers_model(source) if model is None else model
    fill_from_files_(model, checkpoint).eval()
    with opened_attentions(model):
        left = _left_alone(model, skip)
        sizes = _moments(model, left, sketch_above)
    work = target / WORK
    asked: dict[str, Any] = {"budget": repr(budget), "layers": sorted(sizes), "units": units, "methods": repr(methods)}
    asked |= {"loss": repr(loss if loss is None else getattr(loss, "__name__", type(loss))), "damping": repr(damping)}
    asked["sketch_above"] = sketch_above
    _check_space(target, model, sum(sizes.values()))
    _begin(target, work, {**asked, "weights": _facts(checkpoint), "batches": _digest(batches)})
    moments, planned = work / "stats.safetensors", work / "plan.json"
    if not moments.is_file():
        stats = calibrate_in_stages(
            model,
            batches,
            SampledCrossEntropy() if loss is None else loss,
            folder=work / "stages",
            target=[lambda name, _: name in sizes],
            mask=mask,
            progress=progress,
            dtype=torch.float32,
            sketch_above=sketch_above,
            after_stage=lambda name: _release(model.get_submodule(name)),
        )
        stats.mask = None
        stats.save(moments, dtype=torch.float32)
    shutil.rmtree(work / "stages", ignore_errors=True)
    if not planned.is_file():
        stats = Statistics.load(moments)
        release_freed()
        plan = make_plan(model, budget, stats, methods, left, units=units, damping=damping, progress=progress)
        plan.save(planned)
    plan, stats = Plan.load(planned), Statistics.load(moments)
    stats.mask = mask
    layers = work / "layers"
    layers.mkdir(exist_ok=True)
    with opened_attentions(model):
        built = build_in_sequence(model, plan, stats, batches, False, progress, LayerStore(layers, model).keep)
    _put_in_place_(model, built)
    _write(model, target, source, plan)
    shutil.rmtree(work)
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


def _put_in_place_(model: nn.Module, built: dict[str, nn.Module]) -> None:
    """Replaces layers as :func:`factorize_` does, but gives dense ones their parameters, which are in files."""
    own = dict(model.named_modules())
    fitted = {name: new for name, new in built.items() if not is_factored(new)}
    with opened_attentions(model):
        for name, new in fitted.items():
            dense = model.get_submodule(name)
            if own.get(name) is dense:
                dense._parameters.update(new._parameters)
            else:  # a projection of an attention that keeps several in one matrix
                write_(dense, weight_of(new), bias_of(new))
    replace_(model, {name: new for name, new in built.items() if name not in fitted})


def _check_space(target: Path, model: nn.Module, numbers: int) -> None:
    """Raises if the moments of the layers and the weights do not fit the disk."""
    needed = 8 * numbers + sum(parameter.nbytes for parameter in model.parameters())
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{target}: has {free / 2**30:.1f} GiB free, and moments and weights may take {needed / 2**30:.1f} GiB;"
            " free some, or skip layers."
        )


def _facts(checkpoint: Checkpoint) -> list[Any]:
    """What tells one checkpoint from another."""
    return [[name, list(info.shape), str(info.dtype)] for name, info in checkpoint.items()]


def _digest(batches: Sequence[Any]) -> str:
    """A hash of the tensors of all batches."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            found.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _begin(target: Path, work: Path, manifest: dict[str, Any]) -> None:
    """Makes the folders, or raises if they hold something else than a run with the same arguments."""
    check_folder(target)
    text = json.dumps(manifest, indent=1)
    known = work / "arguments.json"
    if target.is_dir() and any(target.iterdir()):
        if not known.is_file():
            raise CheckpointError(
                f"{target}: is not empty, and holds no run of compress_checkpoint that goes on; give a new folder."
            )
        if known.read_text() != text:
            raise CheckpointError(
                f"{target}: holds a run with other weights, batches or settings; give a new folder, or remove it."
            )
        return
    work.mkdir(parents=True)
    with replacing(known) as temporary:
        temporary.write_text(text)


def _write(model: nn.Module, target: Path, source: Path, plan: Plan) -> None:
    """Writes what :func:`load` reads: weights in shards, an index of them, the plan, and the small files beside."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    shared = shared_names(state)
    header = {"version": VERSION, **ModelDescription.of(model).to_json(), "shared": shared}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items() if name not in shared}
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + info.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = info
    last: list[Tensor] = []

    def tensor_of(name: str) -> Tensor:
        release_mapped(last)
        last[:] = [state[name]]
        return state[name]

    if source.is_dir():
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and ".index." not in file.name:
                with replacing(target / file.name) as temporary:
                    shutil.copyfile(file, temporary)
    plan.save(target / "plan.json")
    metadata = {KEY: json.dumps(header)}
    if len(shards) == 1:
        write_streamed(target / "model.safetensors", infos, tensor_of, metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_streamed(target / name, shard, tensor_of, metadata)
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(info.nbytes for info in infos.values())}, "weight_map": places}
    with replacing(target / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2))
