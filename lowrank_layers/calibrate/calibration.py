"""Taking second moments of every layer's inputs and output gradients while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LowRankError
from ..layers import (
    ConvNd,
    LowRankTransposedLinear,
    is_derived,
    is_embedding,
    is_factored,
    layer_cost,
    linear_shape,
    weight_of,
)
from ..layers.patches import output_rows
from ..modules import check_model, opened_attentions, walk_layers
from .fisher import SampledCrossEntropy
from .masks import Kept, data_rows
from .moments import Moments
from .padding import MaskOf, Padding, check_mask, in_backward
from .run import Loss, batch_loss, check_batches, fitting_scale, forward, frozen, is_minimum, layer_input, quiet_eval
from .statistics import LayerStats, Statistics

CALIBRATED = (nn.Linear, ConvNd, nn.Embedding, nn.EmbeddingBag)
"""Layers whose moments are taken; so are those of transformers' ``Conv1D``."""
_TINY = 1e-4
"""Gradients below it are looked at twice: a model's loss against itself has some of 1e-8 by rounding."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    mask: MaskOf | None = None,
    progress: bool = False,
) -> Statistics:
    """Second moments of the inputs, and of the output gradients, of every linear layer, convolution and embedding.

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
        mask: for other models: a key of dict batches, or a function from a batch to a mask ``[B, T]``, nonzero where a
            position is data.
        progress: shows a progress bar.

    Returns:
        Statistics by layer name. Gradients are those of one sample's loss.

    Raises:
        LowRankError: for no batches, batches of another kind, an output that the loss does not take, a loss whose
            gradients are all zero, or activations and gradients that are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)], loss=lr.SampledCrossEntropy())
        >>> stats.samples, stats["2"].inputs.second.shape, stats["2"].gradients.shape
        (32, torch.Size([16, 16]), torch.Size([4, 4]))
        >>> lengths = torch.tensor([[3], [5], [2], [8]])
        >>> stats = lr.calibrate(model, [torch.randn(4, 10, 8)], mask=lambda batch: torch.arange(10) < lengths)
        >>> stats["0"].inputs.rows
        18
    """
    check_model(model)
    check_batches(batches, "calibrate")
    check_mask(mask, "calibrate")
    run = Calibration(model)
    with quiet_eval(model), run as stats, frozen(model), torch.set_grad_enabled(loss is not None):
        stats.with_target, stats.mask = loss is not None, mask
        run.starts_gradients = loss is not None
        batch: Any = None
        for batch in tqdm(batches, desc="calibrate", disable=not progress):
            if loss is None:
                run.padding.start(batch, mask)
                forward(model, batch, with_target=False)
            else:
                run.backward(batch_loss(model, batch, loss, run.padding, mask, "calibrate"))
    if not stats.layers:
        raise LowRankError(
            "calibrate: no layer saw any data; batches is empty, or the model has no layer to calibrate."
        )
    if loss is not None:
        with quiet_eval(model):
            _check_gradients(model, stats, batch, loss)
    return stats


class Calibration:
    """The context in which moments are taken, for those who run the model themselves.

    Inside, every forward pass adds to the input moments and every backward pass to the gradient moments. Attentions
    stand open inside (see ``unfuse.py``), so that their own parameters get no gradients there: do not train inside.

    Args:
        model: whose layers are watched.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> with lr.Calibration(model) as stats:
        ...     model(torch.randn(5, 8)).square().mean().backward()
        >>> stats[""].inputs.rows, stats[""].gradients.shape
        (5, torch.Size([4, 4]))
    """

    def __init__(self, model: nn.Module) -> None:
        self.padding = Padding(check_model(model))
        self.starts_gradients = False
        self._model = model
        self._stats = Statistics()
        self._gradients: dict[str, Moments] = {}
        self._rows: dict[str, int] = {}
        self._traced: set[str] = set()
        self._longest: dict[str, int] = {}
        self._kept: dict[tuple[str, int], Kept] = {}
        self._batch = 0
        self._other_macs = 0.0
        self._half = False
        self._scale = 1.0
        self._peak: Tensor | None = None
        self._hooks: list[Any] = []
        self._open: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Statistics:
        self._open = opened_attentions(self._model)
        self._open.__enter__()
        self.padding.__enter__()
        self._hooks.append(self._model.register_forward_pre_hook(self._count_samples, with_kwargs=True))
        calibrated = dict(_calibrated_layers(self._model))
        for name, module in walk_layers(self._model):
            if name in calibrated:
                self._hooks.append(module.register_forward_hook(self._watch(name), with_kwargs=True))
            elif isinstance(module, (nn.Linear, ConvNd)) and not is_factored(module):
                self._hooks.append(module.register_forward_hook(self._count_macs, with_kwargs=True))
        return self._stats

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.padding.__exit__()
        self._open.__exit__(None, None, None)
        if kind is not None:
            return
        if self._stats.layers and not self._stats.samples:
            raise LowRankError("calibrate: layers were called, but not the model itself; call it as a whole.")
        self._stats.other_macs = round(self._other_macs / max(1, self._stats.samples))
        for name, stats in self._stats.layers.items():
            gradients = self._gradients.get(name)
            stats.gradients = None if gradients is None else gradients.second
            stats.traced = name in self._traced
            stats.positions = stats.inputs.rows / self._stats.samples
            stats.repeats = self._rows[name] / self._longest.get(name, 1) / self._stats.samples
            for moment in (stats.inputs.second, stats.gradients):
                if moment is not None and not bool(torch.isfinite(moment).all()):
                    raise LowRankError(
                        f"calibrate: layer {name!r} has NaN or Inf in its inputs or gradients; look at the batches."
                    )

    def backward(self, loss: Tensor) -> None:
        """Runs the loss backwards; scaled, where a layer's output is fp16, so that gradients do not vanish.

        A mean over 4,096 positions has gradients of 1e-4 and less for each of them, and fp16 rounds to 6e-8.
        """
        if self._half:
            self._scale = fitting_scale(lambda scale: self._largest(loss, scale), loss.dtype)
        torch.autograd.backward(loss, torch.full_like(loss, self._scale))

    def _largest(self, loss: Tensor, scale: float) -> float:
        self._peak = loss.new_zeros((), dtype=torch.float32)
        torch.autograd.backward(loss, torch.full_like(loss, scale), retain_graph=True)
        peak, self._peak = float(self._peak), None
        return peak

    def _count_samples(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self._kept.clear()
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        known = self.padding.samples()
        self._batch = known if known is not None else len(first) if first is not None and first.ndim else 1
        self._stats.samples += self._batch

    @torch.no_grad()
    def _count_macs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if in_backward():
            return
        x = layer_input(args, kwargs)
        rows = self.padding.of(module, x, as_batch(module, x))
        shape = tuple(x.shape[-1 - len(getattr(module, "kernel_size", ())) :])
        share = 1.0 if rows is None else float(rows.inputs.sum()) / rows.inputs.numel()
        self._other_macs += share * layer_cost(module, shape).macs * (x.numel() // math.prod(shape))

    def _watch(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            again = in_backward()  # a recomputation shows nothing new, but has the gradients where it is reentrant
            rows = None if again else self._take(name, module, layer_input(args, kwargs))
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            root = self.starts_gradients and torch.is_grad_enabled() and not output.requires_grad
            if root:
                # nothing before it has gradients; a copy, since a leaf may not be changed in place
                output = output.detach().requires_grad_().clone()
            if output.requires_grad:
                self._traced.add(name)
                self._half = self._half or output.dtype == torch.float16
                output.register_hook(self._watch_gradient(name, module, self._batch, rows, again))
            return output if root else None

        return hook

    @torch.no_grad()
    def _take(self, name: str, module: nn.Module, x: Tensor) -> Kept | None:
        batched = as_batch(module, x.detach())
        rows = self.padding.of(module, x, batched)
        table = is_embedding(module)
        stats = self._stats.layers.get(name)
        if stats is None:
            groups, _, size = linear_shape(module)
            moments = Moments.zeros(size, weight_of(module).device, groups=groups, diagonal=table)
            stats = self._stats.layers[name] = LayerStats(moments, input_shape=tuple(batched.shape[1:]))
            self._rows[name] = 0
        before = stats.inputs.rows
        if table:
            looked_up = batched if rows is None else batched[rows.inputs]
            taken = looked_up.numel()
            if isinstance(module, nn.EmbeddingBag) and module.padding_idx is not None:
                looked_up = looked_up[looked_up != module.padding_idx]  # no part of its bag
            stats.inputs.update_counts(looked_up)
        else:
            for part in data_rows(module, batched, rows):
                stats.inputs.update(part)
            taken = stats.inputs.rows - before
        self._rows[name] += taken
        if taken and name not in self._longest:
            self._longest[name] = max(1, taken // len(batched) if rows is None else rows.longest)
            stats.input_shape = tuple(batched.shape[1:]) if rows is None else rows.sample
        if rows is not None:
            self._kept[name, rows.outputs.numel()] = rows
        return rows

    def _watch_gradient(
        self, name: str, module: nn.Module, samples: int, kept: Kept | None, again: bool
    ) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self._peak is not None:
                self._peak = torch.maximum(self._peak, gradient.detach().abs().amax().float().to(self._peak.device))
                return
            rows = output_rows(module, gradient.detach())
            found = self._kept.get((name, rows.shape[-2])) if again else kept
            rows = rows if found is None else rows[..., found.outputs.flatten(), :]
            if name not in self._gradients:
                groups = rows.shape[0] if rows.ndim == 3 else 1
                self._gradients[name] = Moments.zeros(rows.shape[-1], rows.device, groups=groups)
            # the loss is a mean over the batch; the moment is that of one sample's loss
            self._gradients[name].update(rows * (samples / self._scale))

        return hook


def _check_gradients(model: nn.Module, stats: Statistics, batch: Any, loss: Loss) -> None:
    """Refuses a loss whose gradients are zero, or so small that they may be the rounding of zeros, and are."""
    found = [each.gradients for each in stats.values() if each.gradients is not None]
    largest = max((float(moment.abs().max()) ** 0.5 for moment in found), default=0.0)
    doubtful = largest < _TINY and not isinstance(loss, SampledCrossEntropy)
    if largest == 0 or (doubtful and is_minimum(model, batch, loss)):
        raise LowRankError(
            "calibrate: the loss has no gradient at this model's output, so that no error of a layer would count (a"
            " model compared with itself is at a minimum); use SampledCrossEntropy(), the loss that the model was"
            " trained with, or loss=None."
        )


def as_batch(module: nn.Module, x: Tensor) -> Tensor:
    """The input with a batch dimension, which torch's layers do without."""
    return x if x.ndim > 1 + (len(module.kernel_size) if isinstance(module, ConvNd) else 0) else x[None]


def _calibrated_layers(model: nn.Module) -> list[tuple[str, Any]]:
    def fits(module: nn.Module) -> bool:
        known = isinstance(module, CALIBRATED) or LowRankTransposedLinear.stands_for(module)
        if is_embedding(module) and type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
            return False  # subclasses that compute positions take lengths and masks, not indices
        return known and not is_derived(module)

    return [(name, module) for name, module in walk_layers(model) if fits(module)]
