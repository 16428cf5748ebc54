"""Taking second moments of every layer's inputs and output gradients while a model runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import LowRankError
from ..modules import Selector, check_model, opened_attentions, walk_layers
from .batch_masks import MaskOf, check_mask
from .clipping import check_clip
from .example import first_sample
from .layer_recorder import LayerRecorder, Pass
from .padding import Padding, in_backward
from .result_checks import check_finite, check_gradients, check_seen, largest_gradient
from .run import Loss, batch_loss, check_batches, forward, frozen, quiet_eval
from .sketch import check_sketch_above
from .staged_calibration import calibrate_in_stages
from .statistics import Statistics
from .watched import count_macs, count_samples, watched_layers


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    target: Iterable[Selector] | None = None,
    mask: MaskOf | None = None,
    clip: float | None = None,
    progress: bool = False,
    folder: str | os.PathLike[str] | None = None,
    stages: Iterable[Selector] | None = None,
    sketch_above: int | None = None,
) -> Statistics:
    """Takes the second moments of the inputs and output gradients of every linear layer, convolution and embedding.

    Runs the model in eval mode on its own device; hooks are always removed, the train / eval flags,
    ``requires_grad`` and ``.grad`` are left as they were. Activation checkpointing may be on.

    Padding counts nowhere: the statistics are those of the same samples without it. Masks of shape ``[B, T]`` that the
    model, or a module inside it, is called with are followed without being asked for: ``attention_mask`` and
    ``decoder_attention_mask`` as in transformers, ``key_padding_mask``, ``src_key_padding_mask``,
    ``tgt_key_padding_mask`` and ``memory_key_padding_mask`` as in torch. Where there is none, positions after a
    sample's last label other than -100 are padding. A mask applies to activations whose leading sizes are those of
    batch and positions, ``[B, T, ...]`` or ``[T, B, ...]``, also with a dimension of heads, and to 1-d convolutions
    over ``[B, C, T]``; pooled activations ``[B, C]`` are counted whole.

    Args:
        model: what will be compressed.
        batches: tensors, tuples ``(inputs..., target)`` when a loss is given and ``(inputs...)`` when
            not, or dicts of keyword arguments (their ``"labels"`` are the target).
        loss: ``loss(output, target) -> scalar``, averaged over the batch and its positions; without it only input
            moments are taken. ``SampledCrossEntropy()`` needs no targets: tensors will do. A loss with an argument
            ``mask`` is given the mask of the output, ``[B, T]``, or ``None``.
        target: layers whose moments are taken: names of modules, ends of them, names of modules around them, types, or
            predicates ``(name, module) -> bool``; ``None`` takes all. The moment of a layer of n inputs and m outputs
            is n^2 numbers, and m^2 of gradients: with a loss, leave out outputs to a vocabulary where they are not
            needed.
        mask: for other models: a key of dict batches, or a function from a batch to a mask ``[B, T]``, nonzero where a
            position is data. For any model ``LeaveOut(first=4)``: the first tokens of each sample count as padding.
        clip: scales down the rows of a linear layer's inputs that are longer than this number times the median length
            of the rows of the same call, to that length; such as 10. Convolutions see their inputs as they are.
            :func:`factorize_` fits layers to rows that are scaled likewise.
        progress: shows a progress bar.
        folder: a folder for the moments, so that only those of one stage of the model, such as a transformer block, are
            in memory at a time. All batches go through the model stage by stage; with a loss they come back in the same
            way, for which each stage is run a second time, and its inputs for all batches are in files meanwhile. The
            folder has to stay as long as the statistics are used. A calibration that was interrupted goes on where it
            is called again with the same folder, batches and loss.
        stages: the stages in the place of those that are found: names of modules, ends of them, names of modules around
            them, types, or predicates ``(name, module) -> bool``. Layers outside of them are stages of their own.
        sketch_above: of layers with more outputs than this, the moment of gradients is taken as its diagonal plus 256
            directions, 257 numbers per output in the place of all m; ``None`` takes all of it. Layers of up to 514
            outputs are taken whole in any case.

    Returns:
        Statistics by layer name. Gradients are those of one sample's loss.

    Raises:
        LowRankError: for no batches, batches of another kind, a target that matches nothing, an output that the loss
            does not take, a loss whose gradients are all zero, or activations and gradients that are not finite. With a
            folder also if it holds statistics of something else, and for stages that cannot be run a second time:
            those that change their inputs in place, draw random numbers or keep state.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)], loss=lr.SampledCrossEntropy())
        >>> stats.samples, stats["2"].inputs.second.shape, stats["2"].gradients.shape
        (32, torch.Size([16, 16]), torch.Size([4, 4]))
        >>> list(lr.calibrate(model, [torch.randn(32, 8)], target=["2"]))
        ['2']
        >>> lengths = torch.tensor([[3], [5], [2], [8]])
        >>> stats = lr.calibrate(model, [torch.randn(4, 10, 8)], mask=lambda batch: torch.arange(10) < lengths)
        >>> stats["0"].inputs.rows
        18
        >>> import tempfile
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)], lr.SampledCrossEntropy(), folder=tempfile.mkdtemp())
        >>> stats["2"].gradients.shape
        torch.Size([4, 4])
    """
    check_model(model)
    check_batches(batches, "calibrate")
    check_mask(mask, "calibrate")
    check_clip(clip)
    check_sketch_above(sketch_above, "calibrate")
    if folder is not None:
        settings: dict[str, Any] = {"target": target, "mask": mask, "clip": clip, "progress": progress}
        settings["sketch_above"] = sketch_above
        return calibrate_in_stages(model, batches, loss, folder=folder, stages=stages, **settings)
    if stages is not None:
        raise LowRankError("calibrate: got stages without a folder for their moments, expected folder=.")
    calibration = Calibration(model, target=target)
    current = calibration._pass
    current.padding.mask, current.clip, current.widest = mask, clip, sketch_above
    with quiet_eval(model), calibration as stats, frozen(model), torch.set_grad_enabled(loss is not None):
        stats.with_target, stats.mask, stats.clip = loss is not None, mask, clip
        stats.loss = None if loss is None else getattr(loss, "__name__", type(loss).__name__)
        batch: Any = None
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            calibration._run(batch, loss)
            if stats.example is None:
                stats.example = first_sample(batch, calibration._pass.samples)
    check_seen(stats.layers)
    if loss is not None:
        with quiet_eval(model):
            check_gradients(model, batch, loss, max(map(largest_gradient, stats.values()), default=0.0))
    return stats


class Calibration:
    """Takes moments inside a ``with`` block, for those who run the model themselves.

    Every forward pass adds to the input moments and every backward pass to the gradient moments. Attentions are
    replaced by their four projections inside, so that their own parameters get no gradients: do not train inside.

    Args:
        model: the model whose layers are watched.
        target: which layers, as in :func:`calibrate`; ``None`` takes all.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> with lr.Calibration(model) as stats:
        ...     model(torch.randn(5, 8)).square().mean().backward()
        >>> stats[""].inputs.rows, stats[""].gradients.shape
        (5, torch.Size([4, 4]))
    """

    def __init__(self, model: nn.Module, *, target: Iterable[Selector] | None = None) -> None:
        self._model = check_model(model)
        self._target = target
        self._pass = Pass(Padding(model))
        self._stats = Statistics()
        self._recorders: dict[str, LayerRecorder] = {}
        self._other_macs = 0.0
        self._undo = ExitStack()

    def __enter__(self) -> Statistics:
        with ExitStack() as undo:
            closed = list(walk_layers(self._model))
            undo.enter_context(opened_attentions(self._model))
            layers, others = watched_layers(self._model, self._target, closed)
            undo.enter_context(self._pass.padding)
            undo.callback(self._model.register_forward_pre_hook(self._start_pass, with_kwargs=True).remove)
            for name, module in layers.items():
                undo.callback(module.register_forward_hook(self._record(name), with_kwargs=True).remove)
            for module in others:
                undo.callback(module.register_forward_hook(self._count_macs, with_kwargs=True).remove)
            self._stats.watched = tuple(self._recorders)
            self._undo = undo.pop_all()
        return self._stats

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        if kind is not None:
            return
        if self._stats.layers and not self._stats.samples:
            raise LowRankError("calibrate: layers were called, but not the model itself; call it as a whole.")
        self._stats.other_macs = round(self._other_macs / max(1, self._stats.samples))
        for name, stats in self._stats.items():
            self._recorders[name].finish(self._stats.samples)
            check_finite(name, stats)

    def _run(self, batch: Any, loss: Loss | None) -> None:
        """Runs one batch forward, and its loss backward where there is one."""
        padding = self._pass.padding
        if loss is None:
            padding.start(batch)
            forward(self._model, batch, with_target=False)
        else:
            self._pass.starts_gradients = True
            self._pass.scale.backward(batch_loss(batch, loss, padding, "calibrate"))

    def _start_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        for recorder in self._recorders.values():
            recorder.start_pass()
        self._pass.samples = count_samples(self._pass.padding, args, kwargs)
        self._stats.samples += self._pass.samples

    def _record(self, name: str) -> Callable[..., Any]:
        recorder = self._recorders.setdefault(name, LayerRecorder(self._pass))

        def hook(*call: Any) -> Any:
            output = recorder.hook(*call)
            if recorder.stats is not None:
                self._stats.layers.setdefault(name, recorder.stats)
            return output

        return hook

    def _count_macs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if not in_backward():
            self._other_macs += count_macs(module, args, kwargs, self._pass.padding)
