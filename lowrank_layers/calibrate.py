"""Running a model over batches to take second moments of every layer's inputs and output gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import LowRankError
from .layers import (
    ConvNd,
    LowRankTransposedLinear,
    is_derived,
    is_factored,
    is_table,
    layer_cost,
    linear_shape,
    weight_of,
)
from .moments import LayerStats, Moments, Statistics, input_rows, output_rows
from .unfuse import unfused
from .walk import check_model, own_layers

CALIBRATED = (nn.Linear, ConvNd, nn.Embedding, nn.EmbeddingBag)
"""Layers whose moments are taken; so are those of transformers' ``Conv1D``."""

Loss = Callable[[Any, Any], Tensor]


class SampledCrossEntropy:
    """Cross-entropy against labels drawn from the model's own softened prediction: gives the Fisher matrix.

    No labels are needed. At temperature 1 a network that fits its training data is so sure of itself that the
    sampled gradients vanish for almost every sample; a softened prediction keeps them alive. ResNet-20 at half the
    parameters, channel SVD: 85.38 % at temperature 1, 88.04 % at 4; at 30 %: 73.48 and 76.34 %
    (``benchmarks/results``).

    Args:
        temperature: divides the logits.
        class_dim: the dimension of the classes.
        seed: of the drawn labels; the global generator is left alone.

    Shape:
        output ``[N, ..., classes]``; an object with ``.logits`` is taken too. The target is ignored.

    Examples:
        >>> loss = lr.SampledCrossEntropy()
        >>> loss(torch.randn(8, 10), None).shape
        torch.Size([])

    Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020, section 5.
    """

    def __init__(self, temperature: float = 4.0, *, class_dim: int = -1, seed: int = 0) -> None:
        if not temperature > 0:
            raise LowRankError(f"SampledCrossEntropy: got temperature {temperature!r}, expected a number above 0.")
        self.temperature = temperature
        self.class_dim = class_dim
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any, target: Any = None) -> Tensor:
        """The scalar loss, averaged over the batch and all positions."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            raise LowRankError("SampledCrossEntropy: expected logits of at least 2 dimensions; give your own loss.")
        logits = logits.movedim(self.class_dim, -1).flatten(0, -2).float() / self.temperature
        chances = logits.detach().softmax(-1).cpu()
        labels = torch.multinomial(chances, 1, generator=self._generator).squeeze(1)
        return F.cross_entropy(logits, labels.to(logits.device))


def calibrate(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None, *, progress: bool = False
) -> Statistics:
    """Second moments of the inputs, and of the output gradients, of every linear layer, convolution and table.

    Runs the model in eval mode on its own device; hooks are always removed, the train / eval flags,
    ``requires_grad`` and ``.grad`` are left as they were.

    Args:
        model: what will be compressed.
        batches: tensors, tuples ``(inputs..., target)`` when a loss is given and ``(inputs...)`` when
            not, or dicts of keyword arguments (their ``"labels"`` are the target).
        loss: ``loss(output, target) -> scalar``, averaged over the batch; without it only input moments are taken.
            ``SampledCrossEntropy()`` needs no targets: tensors will do.
        progress: shows a progress bar.

    Returns:
        Statistics by layer name. Gradients are those of one sample's loss.

    Raises:
        LowRankError: for no batches, batches of another kind, or activations and gradients that are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)], loss=lr.SampledCrossEntropy())
        >>> stats.samples, stats["2"].inputs.second.shape, stats["2"].gradients.shape
        (32, torch.Size([16, 16]), torch.Size([4, 4]))
    """
    check_model(model)
    check_batches(batches, "calibrate")
    with quiet_eval(model), Calibration(model) as stats:
        stats.with_target = loss is not None
        weights = [m.weight for _, m in _calibrated_layers(model)]
        trainable = [w.requires_grad for w in weights]
        for weight in weights:
            # an output has a gradient only if something before it does
            weight.requires_grad_(loss is not None and weight.is_floating_point())
        try:
            for batch in tqdm(batches, desc="calibrate", disable=not progress):
                with torch.set_grad_enabled(loss is not None):
                    output, target = forward(model, batch, with_target=loss is not None)
                    if loss is not None:
                        # the hooks on the outputs do the work; autograd.grad leaves .grad alone
                        torch.autograd.grad(check_loss(loss(output, target), "calibrate"), weights, allow_unused=True)
        finally:
            for weight, flag in zip(weights, trainable, strict=True):
                weight.requires_grad_(flag)
    if not stats.layers:
        raise LowRankError(
            "calibrate: no layer saw any data; batches is empty, or the model has no layer to calibrate."
        )
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
        self._model = check_model(model)
        self._stats = Statistics()
        self._gradients: dict[str, Moments] = {}
        self._lengths: dict[str, int] = {}
        self._batch = 0
        self._other_macs = 0
        self._hooks: list[Any] = []
        self._open: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Statistics:
        self._open = unfused(self._model)
        self._open.__enter__()
        self._hooks.append(self._model.register_forward_pre_hook(self._count_samples, with_kwargs=True))
        calibrated = dict(_calibrated_layers(self._model))
        for name, module in own_layers(self._model):
            if name in calibrated:
                self._hooks.append(module.register_forward_hook(self._watch(name), with_kwargs=True))
            elif isinstance(module, (nn.Linear, ConvNd)) and not is_factored(module):
                self._hooks.append(module.register_forward_hook(self._count_macs, with_kwargs=True))
        return self._stats

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._open.__exit__(None, None, None)
        if kind is not None:
            return
        if self._stats.layers and not self._stats.samples:
            raise LowRankError("calibrate: layers were called, but not the model itself; call it as a whole.")
        self._stats.other_macs = round(self._other_macs / max(1, self._stats.samples))
        for name, stats in self._stats.layers.items():
            gradients = self._gradients.get(name)
            stats.gradients = None if gradients is None else gradients.second
            stats.positions = stats.inputs.rows / self._stats.samples
            stats.repeats = self._lengths[name] / self._stats.samples
            for moment in (stats.inputs.second, stats.gradients):
                if moment is not None and not bool(torch.isfinite(moment).all()):
                    raise LowRankError(
                        f"calibrate: layer {name!r} has NaN or Inf in its inputs or gradients; look at the batches."
                    )

    def _count_samples(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        self._batch = len(first) if first is not None and first.ndim else 1
        self._stats.samples += self._batch

    def _count_macs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = layer_input(args, kwargs)
        shape = tuple(x.shape[-1 - len(getattr(module, "kernel_size", ())) :])
        self._other_macs += layer_cost(module, shape).macs * (x.numel() // math.prod(shape))

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = layer_input(args, kwargs).detach()
            batched = as_batch(module, x)
            stats = self._stats.layers.get(name)
            if stats is None:
                groups, _, size = linear_shape(module)
                moments = Moments.zeros(size, weight_of(module).device, groups=groups, diagonal=is_table(module))
                stats = self._stats.layers[name] = LayerStats(moments, input_shape=tuple(batched.shape[1:]))
                self._lengths[name] = 0
            self._lengths[name] += len(batched)
            if is_table(module):
                stats.inputs.update_counts(batched)
            else:
                for rows in input_rows(module, batched):
                    stats.inputs.update(rows)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._watch_gradient(name, module, self._batch))

        return hook

    def _watch_gradient(self, name: str, module: nn.Module, samples: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            rows = output_rows(module, gradient.detach())
            if name not in self._gradients:
                groups = rows.shape[0] if rows.ndim == 3 else 1
                self._gradients[name] = Moments.zeros(rows.shape[-1], rows.device, groups=groups)
            # the loss is a mean over the batch; the moment is that of one sample's loss
            self._gradients[name].update(rows * samples)

        return hook


def check_batches(batches: object, owner: str) -> None:
    """Refuses one batch in the place of several."""
    if isinstance(batches, (Tensor, Mapping)):
        raise LowRankError(f"{owner}: got one {type(batches).__name__}, expected a list of batches; write [batch].")
    if not isinstance(batches, Iterable):
        raise LowRankError(f"{owner}: got {type(batches).__name__}, expected a list of batches.")


def check_loss(value: object, owner: str) -> Tensor:
    """The loss, if it is a scalar that something can be learned from."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LowRankError(
            f"{owner}: the loss returned {got}, expected a scalar tensor that depends on the model's output."
        )
    return value


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a layer was called with."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def forward(model: nn.Module, batch: Any, *, with_target: bool) -> tuple[Any, Any]:
    """Runs one batch; returns output and target."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    target = None
    if isinstance(batch, Mapping):
        kwargs, target = batch, batch.get("labels")
    elif isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, (tuple, list)) and batch:
        args = batch
        if with_target and len(batch) > 1:
            args, target = batch[:-1], batch[-1]
    else:
        raise LowRankError(
            f"got a batch of type {type(batch).__name__}, expected a tensor, a tuple (inputs..., target)"
            " or a dict of keyword arguments."
        )
    try:
        return model(*args, **kwargs), target
    except TypeError as error:
        _check_signature(model, args, kwargs, error, with_target=with_target)
        raise


def _check_signature(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: TypeError, *, with_target: bool
) -> None:
    """Turns the error of a batch that does not fit the model's signature into one that says so."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as mismatch:
        got = f"{len(args)} inputs" if args else f"the keyword arguments {', '.join(map(str, kwargs))}"
        hint = (
            ""
            if with_target or len(args) < 2
            else (" Without a loss every item of a tuple is an input: leave the target out, or calibrate with a loss.")
        )
        raise LowRankError(
            f"got a batch of {got}, which {type(model).__name__}.forward does not take ({mismatch}).{hint}"
        ) from error


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def as_batch(module: nn.Module, x: Tensor) -> Tensor:
    """The input with a batch dimension, which torch's layers do without."""
    return x if x.ndim > 1 + (len(module.kernel_size) if isinstance(module, ConvNd) else 0) else x[None]


def _calibrated_layers(model: nn.Module) -> list[tuple[str, Any]]:
    def fits(module: nn.Module) -> bool:
        known = isinstance(module, CALIBRATED) or LowRankTransposedLinear.stands_for(module)
        return known and not is_derived(module)

    return [(name, module) for name, module in own_layers(model) if fits(module)]
