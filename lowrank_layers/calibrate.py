"""Streamed second moments of every layer's inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import LowRankError
from .layers import is_factored, layer_cost, weight_of
from .walk import check_model, own_layers

_CHUNK = 2**24
"""Most patch entries formed at once (64 MiB in fp32)."""

CALIBRATED = (nn.Linear, nn.Conv2d, nn.Embedding)
"""Layers whose moments are taken."""

Loss = Callable[[Any, Any], Tensor]


@dataclass
class Moments:
    """Running mean and second moment of rows, in fp64.

    Args:
        mean: ``[n]``.
        second: ``E[x x^T]``, ``[n, n]``; its diagonal ``[n]`` for one-hot rows (embeddings).
        rows: how many rows went in.
    """

    mean: Tensor
    second: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device, *, diagonal: bool = False) -> Moments:
        """Nothing seen yet."""
        device = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
        mean = torch.zeros(n, dtype=torch.float64, device=device)
        return cls(mean, mean.clone() if diagonal else mean.new_zeros(n, n))

    def update(self, rows: Tensor) -> None:
        """Takes in ``[count, n]``: products in the precision of the data, sums in fp64."""
        self._add(rows.sum(0), rows.mT @ rows, len(rows))

    def update_counts(self, indices: Tensor) -> None:
        """Takes in one-hot rows, given by their index."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.mean))
        self._add(counts, counts, indices.numel())

    def _add(self, total: Tensor, products: Tensor, count: int) -> None:
        if count == 0:
            return
        self.rows += count
        keep = 1 - count / self.rows
        self.mean.mul_(keep).add_(total.to(self.mean), alpha=1 / self.rows)
        self.second.mul_(keep).add_(products.to(self.second), alpha=1 / self.rows)

    def covariance(self) -> Tensor:
        """``E[x x^T] - E[x] E[x]^T``; a diagonal stays as it is, since one-hot rows are not centred."""
        return self.second if self.second.ndim == 1 else self.second - torch.outer(self.mean, self.mean)


@dataclass
class LayerStats:
    """What calibration knows of one layer.

    Args:
        inputs: moments of the inputs (a convolution's patches); of the already compressed prefix's, when
            ``cross`` is there.
        gradients: ``E[g g^T]`` of the loss's gradients at the output, ``[m, m]``, or ``None``.
        input_shape: shape of one sample's input, without the batch.
        positions: rows a sample of the model, over all calls.
        repeats: how many such inputs the layer takes for one sample of the model (a shared layer: one a call).
        cross: ``E[x x'^T] - E[x] E[x']^T`` of the dense model's inputs ``x`` and the compressed one's ``x'``.
        target_mean: ``E[x]``.
    """

    inputs: Moments
    gradients: Tensor | None = None
    input_shape: tuple[int, ...] | None = None
    positions: float = 1.0
    repeats: float = 1.0
    cross: Tensor | None = None
    target_mean: Tensor | None = None


@dataclass
class Statistics(Mapping[str, LayerStats]):
    """Layer name to :class:`LayerStats`, and how they were taken.

    Args:
        layers: the statistics of every calibrated layer that was called.
        samples: how many samples were seen.
        with_target: whether the last item of a tuple batch is the target.
        other_macs: MACs a sample of layers that are counted but not calibrated (grouped and 1-d, 3-d convolutions).
    """

    layers: dict[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    with_target: bool = False
    other_macs: int = 0

    def __getitem__(self, name: str) -> LayerStats:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class SampledCrossEntropy:
    """Cross-entropy against labels drawn from the model's own softened prediction: gives the Fisher matrix.

    No labels are needed. At temperature 1 a network that fits its training data is so sure of itself that the
    sampled gradients vanish for almost every sample; a softened prediction keeps them alive (``benchmarks/results``
    has the table on ResNet-20 from which the default was taken).

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
    """Second moments of the inputs, and of the output gradients, of every Linear, Conv2d and Embedding.

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
    if isinstance(batches, (Tensor, dict)):
        raise LowRankError(f"calibrate: got one {type(batches).__name__}, expected a list of batches; write [batch].")
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
                        torch.autograd.grad(loss(output, target), weights, allow_unused=True)
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

    Inside, every forward pass adds to the input moments and every backward pass to the gradient moments.

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

    def __enter__(self) -> Statistics:
        self._hooks.append(self._model.register_forward_pre_hook(self._count_samples, with_kwargs=True))
        calibrated = dict(_calibrated_layers(self._model))
        for name, module in own_layers(self._model):
            if name in calibrated:
                self._hooks.append(module.register_forward_hook(self._watch(name), with_kwargs=True))
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                self._hooks.append(module.register_forward_hook(self._count_macs, with_kwargs=True))
        return self._stats

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            return
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

    def _count_macs(self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = layer_input(args, kwargs)
        shape = tuple(x.shape[-1 - len(conv.kernel_size) :])  # type: ignore[arg-type]
        self._other_macs += layer_cost(conv, shape).macs * (x.numel() // math.prod(shape))

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = layer_input(args, kwargs).detach()
            batched = x if x.ndim > (3 if isinstance(module, nn.Conv2d) else 1) else x[None]
            stats = self._stats.layers.get(name)
            if stats is None:
                weight = weight_of(module)
                table = isinstance(module, nn.Embedding)
                size = len(weight) if table else weight[0].numel()
                moments = Moments.zeros(size, weight.device, diagonal=table)
                stats = self._stats.layers[name] = LayerStats(moments, input_shape=tuple(batched.shape[1:]))
                self._lengths[name] = 0
            self._lengths[name] += len(batched)
            if isinstance(module, nn.Embedding):
                stats.inputs.update_counts(batched)
            else:
                for rows in input_rows(module, batched):
                    stats.inputs.update(rows)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    self._watch_gradient(name, module, self._batch)
                )

        return hook

    def _watch_gradient(self, name: str, module: nn.Module, samples: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            rows = gradient.detach().float() if gradient.dtype != torch.float64 else gradient.detach()
            if isinstance(module, nn.Conv2d):
                rows = rows.movedim(-3, -1)
            rows = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]
            if name not in self._gradients:
                self._gradients[name] = Moments.zeros(rows.shape[-1], rows.device)
            # the loss is a mean over the batch; the moment is that of one sample's loss
            self._gradients[name].update(rows * samples)

        return hook


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs as rows of the layer's weight matrix: ``[count, in]``, or a convolution's patches, in chunks."""
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(module, nn.Conv2d):
        yield x.reshape(-1, x.shape[-1])
        return
    x = pad_input(module, x)
    area = x.shape[-1] * x.shape[-2] // (module.stride[0] * module.stride[1])
    step = max(1, _CHUNK // max(1, area * module.weight[0].numel()))
    for chunk in torch.split(x, step):
        patches = F.unfold(chunk, module.kernel_size, module.dilation, stride=module.stride)
        yield patches.mT.reshape(-1, patches.shape[1])


def pad_input(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What the convolution sees: its input padded by its own numbers and mode."""
    if isinstance(conv.padding, str):
        totals = [
            d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (*sides[1], *sides[0]), mode=mode)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a layer was called with."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def forward(model: nn.Module, batch: Any, *, with_target: bool) -> tuple[Any, Any]:
    """Runs one batch; returns output and target."""
    if isinstance(batch, Mapping):
        return model(**batch), batch.get("labels")
    if isinstance(batch, Tensor):
        return model(batch), None
    if isinstance(batch, (tuple, list)) and batch:
        if not with_target or len(batch) == 1:
            return model(*batch), None
        return model(*batch[:-1]), batch[-1]
    raise LowRankError(
        f"got a batch of type {type(batch).__name__}, expected a tensor, a tuple (inputs..., target)"
        " or a dict of keyword arguments."
    )


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


def _calibrated_layers(model: nn.Module) -> list[tuple[str, Any]]:
    layers = [(n, m) for n, m in own_layers(model) if isinstance(m, CALIBRATED) and not is_factored(m)]
    return [(n, m) for n, m in layers if not (isinstance(m, nn.Conv2d) and m.groups != 1)]
