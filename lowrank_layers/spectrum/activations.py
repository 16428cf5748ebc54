"""Principal components of what the modules of a model put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibrate import MaskOf, Padding, as_batch, check_batches, check_mask, forward, main_output, quiet_eval
from ..drawing import colour, figure_of, legend, logarithmic, panels
from ..errors import LowRankError
from ..layers import ConvNd, FactoredModule
from ..linalg import full_precision
from ..modules import Selector, check_model, opened_attentions, select, walk_layers
from .covariance import RunningCovariance
from .matrix_spectrum import MatrixSpectrum
from .table import percent, shown, table
from .weights import has_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = ("module", "features", "rows", "first", "90%", "95%", "99%", "effective", "participation")
_CHANNELS_FIRST = (
    *(ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


@dataclass(frozen=True, eq=False)
class ActivationLayer:
    """The principal components of one module's output.

    Args:
        name: the module's name in the model.
        rows: number of rows that were seen: samples, tokens or pixels.
        variances: eigenvalues of the covariance of the features, largest first.
        components: the eigenvectors, one per row.
        mean: mean of the features.

    Shape:
        ``variances`` and ``mean`` ``[features]``, ``components`` ``[features, features]``.
    """

    name: str
    rows: int
    variances: Tensor
    components: Tensor
    mean: Tensor

    @property
    def explained_variance_ratio(self) -> Tensor:
        """Fraction of the variance that each component explains, ``[features]``; zeros where nothing varies."""
        return self.variances / self.variances.sum().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def spectrum(self) -> MatrixSpectrum:
        """Singular values of the centred activations over ``sqrt(rows - 1)``, with ranks and norms."""
        count = len(self.variances)
        return MatrixSpectrum(self.variances.sqrt(), (count, count))

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p_i log p_i)``, with ``p_i`` the singular values of the centred activations over their sum."""
        return self.spectrum.effective_rank

    @property
    def participation_ratio(self) -> float:
        """``(sum v_i)^2 / sum v_i^2`` of the variances, a linear estimate of the intrinsic dimension."""
        return self.spectrum.participation_ratio


@dataclass(frozen=True, eq=False)
class ActivationSpectrum:
    """What :func:`activation_spectrum` found; it prints as a table.

    Args:
        layers: the modules, in the order in which they first ran.
    """

    layers: tuple[ActivationLayer, ...]

    def __iter__(self) -> Iterator[ActivationLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> ActivationLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise LowRankError(f"the spectrum has no module {name!r}. It has {', '.join(each.name for each in self)}.")

    def __str__(self) -> str:
        return table(_HEAD, [_row(layer) for layer in self])

    def plot(self) -> Figure:
        """Plots the part of the variance that the first components of each module explain.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        axes = panels(1)[0]
        for k, layer in enumerate(self):
            explained = layer.explained_variance_ratio.cumsum(0).tolist()
            label = f"{layer.name} (effective rank {shown(layer.effective_rank)})"
            axes.plot(range(1, len(explained) + 1), explained, color=colour(k), label=label)
        axes.set(xlabel="components", ylabel="variance explained", ylim=(0, 1.04), title="Activations")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        logarithmic(axes)
        legend(axes)
        return figure_of(axes)


@full_precision
@torch.no_grad()
def activation_spectrum(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: Iterable[Selector] | None = None,
    mask: MaskOf | None = None,
    progress: bool = False,
) -> ActivationSpectrum:
    r"""Runs a model over batches and computes the principal components of its modules' outputs.

    The covariance is accumulated batch by batch, about the mean; no activations are kept. Padding counts nowhere, as in
    :func:`calibrate`. The model runs in eval mode and is left as it was.

    Features are the last dimension, as in ``[B, T, C]``. They are the second one in the outputs of convolutions, batch
    and group norms and poolings, and in any output of four dimensions or more ``[B, C, H, W]``, except where the last
    dimension is what the module works on (``nn.Linear``, ``nn.LayerNorm``, ``nn.Embedding``). Of a tuple, a dict or an
    output of transformers the logits are taken, or else the first tensor of two dimensions or more.

    Args:
        model: the model.
        batches: tensors, tuples of inputs, or dicts of keyword arguments.
        target: modules to watch: names, ends of names, parents, types or predicates; ``None`` takes all linear layers,
            convolutions and embeddings.
        mask: how the mask of a batch is found where the model is called with none, as in :func:`calibrate`.
        progress: shows a progress bar.

    Raises:
        LowRankError: for a wrapped or compiled model, no batches, a target that matches nothing or never ran, or
            activations that are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = lr.activation_spectrum(model, [torch.randn(100, 8), torch.randn(100, 8)], target=["0", nn.ReLU])
        >>> [(layer.name, layer.rows, len(layer.variances)) for layer in found]
        [('0', 200, 16), ('1', 200, 16)]
        >>> found["0"].spectrum.numerical_rank(torch.float32)  # sixteen features of eight inputs
        8
    """
    check_model(model, quantized=True)
    check_batches(batches, "activation_spectrum")
    check_mask(mask, "activation_spectrum")
    seen: dict[str, RunningCovariance] = {}
    padding = Padding(model, mask)
    closed = list(walk_layers(model))
    with quiet_eval(model), opened_attentions(model), padding, ExitStack() as undo:
        taken = None if target is None else select(model, target, "target", closed)
        for name, module in walk_layers(model):
            watched = has_matrix(module) if taken is None else name in taken
            if watched or isinstance(module, ConvNd):  # a convolution moves the padding, watched or not
                hook = _watch(padding, seen, name if watched else None)
                undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in tqdm(batches, desc="activation_spectrum", disable=not progress):
            padding.start(batch)
            forward(model, batch, with_target=False)
    layers = tuple(_finish(name, found) for name, found in seen.items() if found.rows)
    if not layers:
        raise LowRankError(
            "activation_spectrum: no module saw any data; batches is empty, or what target= names never ran or returned"
            " no floating point tensor."
        )
    return ActivationSpectrum(layers)


def _watch(padding: Padding, seen: dict[str, RunningCovariance], name: str | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        real = None
        if isinstance(module, ConvNd):
            x = args[0] if args else kwargs["input"]
            found = padding.of(module, x, as_batch(module, x))
            real = None if found is None or module.transposed else found.outputs
        value = main_output(output)
        if name is None or value is None or not value.is_floating_point():
            return
        rows = _features_last(module, value.detach())
        if real is None:
            real = padding.of_activation(value, tuple(rows.shape[:-1]))
        kept = rows.flatten(0, -2) if real is None else rows[real]
        if name not in seen:
            seen[name] = RunningCovariance(rows.shape[-1], rows.device)
        seen[name].update(kept)

    return hook


def _features_last(module: nn.Module, value: Tensor) -> Tensor:
    """The output with a batch dimension and its features in the last one."""
    if value.ndim < 2:
        return value.reshape(1, -1)
    if isinstance(module, ConvNd) and value.ndim < len(module.kernel_size) + 2:
        value = value[None]
    kind = module.dense_type if isinstance(module, FactoredModule) else type(module)
    first = issubclass(kind, _CHANNELS_FIRST) or value.ndim > 3
    return value.movedim(1, -1) if first and not issubclass(kind, _CHANNELS_LAST) else value


def _finish(name: str, found: RunningCovariance) -> ActivationLayer:
    covariance = found.covariance()
    if not bool(torch.isfinite(covariance).all()):
        raise LowRankError(f"activation_spectrum: the output of {name!r} has NaN or Inf; look at the batches.")
    values, vectors = torch.linalg.eigh(covariance)
    return ActivationLayer(name, found.rows, values.flip(0).clamp_min(0), vectors.mT.flip(0), found.mean)


def _row(layer: ActivationLayer) -> tuple[str, ...]:
    spectrum = layer.spectrum
    ranks = [str(spectrum.rank_for_energy(fraction)) for fraction in (0.9, 0.95, 0.99)]
    first = percent(float(layer.explained_variance_ratio[0]))
    numbers = map(shown, (layer.effective_rank, layer.participation_ratio))
    return layer.name, str(len(layer.variances)), f"{layer.rows:,}", first, *ranks, *numbers
