"""The spectra of the weights of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..calibrate.statistics import Statistics
from ..compress.candidates import Candidate
from ..compress.damping import Damping
from ..drawing import colour, figure_of, legend, logarithmic, panels
from ..errors import LowRankError
from ..layers import ConvNd, FactoredModule, LowRankTransposedLinear, is_embedding, matrices_of, weight_of
from ..linalg import full_precision, working_dtype
from ..modules import Selector, check_model, opened_attentions, select, walk_layers
from .matrix_spectrum import MatrixSpectrum
from .table import shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = (
    *("layer", "shape", "spectral", "nuclear", "Frobenius", "condition", "stable", "effective"),
    *("90%", "95%", "99%", "G-D", "EVBMF", "alpha"),
)


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The spectrum of one layer's weight.

    Args:
        name: the layer's name in the model.
        raw: spectrum of the weight itself.
        rank: number of its singular values above rounding, in fp64 for a weight in fp64 and in fp32 for all others.
        weighted: spectrum of ``G^(1/2) W X^(1/2)``, whose squares are in units of loss; ``None`` without statistics.
    """

    name: str
    raw: MatrixSpectrum
    rank: int
    weighted: MatrixSpectrum | None = None


@dataclass(frozen=True, eq=False)
class WeightSpectrum:
    """What :func:`weight_spectrum` found; it prints as a table, with a second one of weighted spectra.

    Args:
        layers: the spectra, in the order of the model.
    """

    layers: tuple[LayerSpectrum, ...]

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerSpectrum:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise LowRankError(f"the spectrum has no layer {name!r}. It has {', '.join(each.name for each in self)}.")

    def __str__(self) -> str:
        text = table(_HEAD, [_row(layer.name, layer.raw) for layer in self])
        weighted = [_row(layer.name, layer.weighted) for layer in self if layer.weighted is not None]
        return f"{text}\n\nweighted by inputs and gradients\n{table(_HEAD, weighted)}" if weighted else text

    def plot(self) -> Figure:
        """Plots how the singular values of each layer decay, and with statistics the weighted ones beside them.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        drawn = {"Weights": [(each.name, each.raw) for each in self]}
        weighted = [(each.name, each.weighted) for each in self if each.weighted is not None]
        if weighted:
            drawn["Weighted by inputs and gradients"] = weighted
        axes = panels(len(drawn))
        for panel, (title, spectra) in zip(axes, drawn.items(), strict=True):
            for k, (name, spectrum) in enumerate(spectra):
                count = len(spectrum.values)
                decay = (spectrum.values / spectrum.values[0].clamp_min(1e-300)).clamp_min(1e-6)
                panel.plot([(index + 1) / count for index in range(count)], decay.tolist(), color=colour(k), label=name)
            panel.set(xlabel="index / number of singular values", ylabel="singular value / largest", title=title)
            logarithmic(panel, "y")
            legend(panel)
        return figure_of(axes[0])


@full_precision
@torch.no_grad()
def weight_spectrum(
    model: nn.Module,
    stats: Statistics | None = None,
    *,
    target: Iterable[Selector] | None = None,
    damping: Damping | None = None,
) -> WeightSpectrum:
    r"""Computes the singular values of every weight of a model, with norms, ranks and the power-law exponent.

    An embedding is transposed, the kernel of a convolution is the matrix ``[out, in * area]`` that multiplies patches
    (weightwatcher takes one matrix for each position of the kernel instead, so that its exponents differ there). A
    grouped convolution is one block-diagonal matrix. A factored layer is multiplied out, and an
    ``nn.MultiheadAttention`` shows its four projections.

    With statistics there is also the spectrum of :math:`G^{1/2} W X^{1/2}`, with ``X`` the second moment of the inputs
    and ``G`` that of the loss's gradients, by which :func:`make_plan` chooses ranks.

    Args:
        model: the model; it is not changed.
        stats: what :func:`calibrate` returned for it.
        target: layers to look at: names, ends of names, parents, types or predicates; ``None`` takes all.
        damping: ridges on the moments in the statistics, as in :func:`make_plan`.

    Raises:
        LowRankError: for a wrapped or compiled model, one without linear layers, convolutions and embeddings, a target
            that matches nothing, or weights that are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = lr.weight_spectrum(model)
        >>> [(layer.name, layer.raw.shape) for layer in found]
        [('0', (4, 6)), ('2', (2, 4))]
        >>> torch.testing.assert_close(found["0"].raw.values, torch.linalg.svdvals(model[0].weight.double()))
    """
    check_model(model, quantized=True)
    damping = Damping.default(stats) if damping is None else damping
    closed = list(walk_layers(model))
    found = []
    with opened_attentions(model):
        taken = None if target is None else select(model, target, "target", closed)
        for name, module in walk_layers(model):
            if has_matrix(module) and (taken is None or name in taken):
                dense = module.to_dense() if isinstance(module, FactoredModule) else module
                known = None if stats is None else stats.get(name)
                weighted = None
                if known is not None and known.inputs.rows:
                    problems = Candidate(dense, known, damping=damping).problems
                    values = torch.cat([problem.singular_values for problem in problems])
                    weighted = MatrixSpectrum(values.sort(descending=True).values, _shape(dense))
                raw = _raw(dense, name)
                rank = raw.numerical_rank(working_dtype(weight_of(dense)))
                found.append(LayerSpectrum(name, raw, rank, weighted))
    if not found:
        raise LowRankError("weight_spectrum: the model has no linear layer, convolution or embedding to look at.")
    return WeightSpectrum(tuple(found))


def has_matrix(module: nn.Module) -> bool:
    """Returns whether a layer is a linear map by one weight: dense or factored."""
    if isinstance(module, FactoredModule):
        return hasattr(module, "dense_type") and module.dense_type is not nn.MultiheadAttention
    known = isinstance(module, (nn.Linear, ConvNd)) or is_embedding(module)
    return (known or LowRankTransposedLinear.stands_for(module)) and weight_of(module).ndim > 1


def _raw(dense: nn.Module, name: str) -> MatrixSpectrum:
    """The spectrum of a dense layer's weight; groups are the blocks of one block-diagonal matrix."""
    try:
        values = torch.linalg.svdvals(matrices_of(dense).double()).flatten()
    except LowRankError as error:
        raise LowRankError(f"{name!r}: {error}") from None
    return MatrixSpectrum(values.sort(descending=True).values, _shape(dense))


def _shape(dense: nn.Module) -> tuple[int, int]:
    groups, rows, columns = matrices_of(dense).shape
    return groups * rows, groups * columns


def _row(name: str, found: MatrixSpectrum) -> tuple[str, ...]:
    law = found.power_law
    numbers = [
        *(found.spectral_norm, found.nuclear_norm, found.frobenius_norm, found.condition_number),
        *(found.stable_rank, found.effective_rank),
    ]
    ranks = [found.rank_for_energy(fraction) for fraction in (0.9, 0.95, 0.99)]
    shape = "x".join(map(str, found.shape))
    counts = map(str, [*ranks, found.gavish_donoho_rank, found.evbmf_rank])
    return name, shape, *map(shown, numbers), *counts, shown(None if law is None else law.alpha)
