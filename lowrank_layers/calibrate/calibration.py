"""Taking second moments of every layer's inputs and output gradients while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LowRankError
from ..layers import ConvNd, LowRankTransposedLinear, is_derived, is_embedding, is_factored, layer_cost
from ..modules import Selector, check_model, opened_attentions, select, walk_layers
from .batch_masks import MaskOf, check_mask
from .example import first_sample
from .fisher import SampledCrossEntropy
from .layer_recorder import LayerRecorder, Pass, as_batch
from .padding import Padding, in_backward
from .run import Loss, batch_loss, check_batches, forward, frozen, is_minimum, layer_input, quiet_eval
from .statistics import Statistics

CALIBRATED = (nn.Linear, ConvNd, nn.Embedding, nn.EmbeddingBag)
"""Layers whose moments are taken; so are those of transformers' ``Conv1D``."""
_TINY = 1e-4
"""Gradients below it may be the rounding of zeros: a model's loss against itself has some of 1e-8."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    target: Iterable[Selector] | None = None,
    mask: MaskOf | None = None,
    progress: bool = False,
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
            position is data.
        progress: shows a progress bar.

    Returns:
        Statistics by layer name. Gradients are those of one sample's loss.

    Raises:
        LowRankError: for no batches, batches of another kind, a target that matches nothing, an output that the loss
            does not take, a loss whose gradients are all zero, or activations and gradients that are not finite.

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
    """
    check_model(model)
    check_batches(batches, "calibrate")
    check_mask(mask, "calibrate")
    calibration = Calibration(model, target=target)
    calibration._pass.padding.mask = mask
    with quiet_eval(model), calibration as stats, frozen(model), torch.set_grad_enabled(loss is not None):
        stats.with_target, stats.mask = loss is not None, mask
        stats.loss = None if loss is None else getattr(loss, "__name__", type(loss).__name__)
        batch: Any = None
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            calibration._run(batch, loss)
            if stats.example is None:
                stats.example = first_sample(batch, calibration._pass.samples)
    if not stats.layers:
        raise LowRankError(
            "calibrate: no layer saw any data; batches is empty, or the model has no layer to calibrate (see target=)."
        )
    if loss is not None:
        with quiet_eval(model):
            _check_gradients(model, stats, batch, loss)
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
            taken = None if self._target is None else select(self._model, self._target, "target", closed)
            undo.enter_context(self._pass.padding)
            undo.callback(self._model.register_forward_pre_hook(self._start_pass, with_kwargs=True).remove)
            for name, module in walk_layers(self._model):
                if is_calibrated(module) and (taken is None or name in taken):
                    undo.callback(module.register_forward_hook(self._record(name), with_kwargs=True).remove)
                elif isinstance(module, (nn.Linear, ConvNd)) and not is_factored(module):
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
            for moment in (stats.inputs.second, stats.gradients):
                if moment is not None and not bool(torch.isfinite(moment).all()):
                    raise LowRankError(
                        f"calibrate: layer {name!r} has NaN or Inf in its inputs or gradients; look at the batches."
                    )

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
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        known = self._pass.padding.samples()
        self._pass.samples = known if known is not None else len(first) if first is not None and first.ndim else 1
        self._stats.samples += self._pass.samples

    def _record(self, name: str) -> Callable[..., Any]:
        recorder = self._recorders.setdefault(name, LayerRecorder(self._pass))

        def hook(*call: Any) -> Any:
            output = recorder.hook(*call)
            if recorder.stats is not None:
                self._stats.layers.setdefault(name, recorder.stats)
            return output

        return hook

    @torch.no_grad()
    def _count_macs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if in_backward():
            return
        x = layer_input(args, kwargs)
        found = self._pass.padding.of(module, x, as_batch(module, x))
        shape = tuple(x.shape[-1 - len(getattr(module, "kernel_size", ())) :])
        share = 1.0 if found is None else float(found.inputs.sum()) / found.inputs.numel()
        self._other_macs += share * layer_cost(module, shape).macs * (x.numel() // math.prod(shape))


def _check_gradients(model: nn.Module, stats: Statistics, batch: Any, loss: Loss) -> None:
    """Raises for a loss whose gradients are zero, or the rounding of zeros."""
    found = [each.gradients for each in stats.values() if each.gradients is not None]
    largest = max((float(moment.abs().max()) ** 0.5 for moment in found), default=0.0)
    doubtful = largest < _TINY and not isinstance(loss, SampledCrossEntropy)
    if largest == 0 or (doubtful and is_minimum(model, batch, loss)):
        raise LowRankError(
            "calibrate: the loss has no gradient at this model's output, so that no error of a layer would count (a"
            " model compared with itself is at a minimum); use SampledCrossEntropy(), the loss that the model was"
            " trained with, or loss=None."
        )


def is_calibrated(module: nn.Module) -> bool:
    """Whether the moments of a module are taken."""
    known = isinstance(module, CALIBRATED) or LowRankTransposedLinear.stands_for(module)
    if is_embedding(module) and type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return False  # subclasses that compute positions take lengths and masks, not indices
    return known and not is_derived(module)
