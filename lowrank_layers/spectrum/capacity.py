"""How many directions the layers of a model let through, from input to output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..calibrate import MaskOf
from ..drawing import colour, figure_of, logarithmic, row
from .activations import activation_spectrum
from .table import shown, table
from .weights import LayerSpectrum, weight_spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = ("layer", "shape", "rank", "of", "condition", "weight's dimension", "output's dimension")


@dataclass(frozen=True)
class LayerCapacity:
    """What one layer lets through.

    Args:
        name: the layer's name in the model.
        shape: rows and columns of its matrix.
        rank: rank of its matrix: its singular values above rounding.
        condition: condition number of its matrix.
        weight_dimension: ``(sum s_i^2)^2 / sum s_i^4``, the number of directions that hold the weight's energy.
        output_dimension: ``(sum v_i)^2 / sum v_i^2`` of the variances of its outputs on data, a linear estimate of
            their intrinsic dimension; ``None`` without data.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    condition: float
    weight_dimension: float
    output_dimension: float | None = None


@dataclass(frozen=True)
class Capacity:
    """What :func:`capacity` found; it prints as a table.

    Args:
        layers: the layers, from input to output.
    """

    layers: tuple[LayerCapacity, ...]

    def __iter__(self) -> Iterator[LayerCapacity]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def bottleneck(self) -> LayerCapacity:
        """The layer of least rank; of several the first."""
        return min(self.layers, key=lambda layer: layer.rank)

    def __str__(self) -> str:
        rows = [
            (
                *(each.name, "x".join(map(str, each.shape)), str(each.rank), str(min(each.shape))),
                *map(shown, (each.condition, each.weight_dimension, each.output_dimension)),
            )
            for each in self
        ]
        least = self.bottleneck
        return f"{table(_HEAD, rows)}\nleast rank: {least.rank}, of {least.name!r}"

    def plot(self) -> Figure:
        """Plots rank and dimensions of each layer, from the input at the top to the output at the bottom.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        axes = row(1, width=6.5, height=1.6 + 0.28 * len(self))[0]
        marks: dict[str, tuple[str, list[float | None]]] = {
            "rank": ("o", [each.rank for each in self]),
            "dimension of the weight": ("s", [each.weight_dimension for each in self]),
            "dimension of the outputs": ("^", [each.output_dimension for each in self]),
        }
        places = range(len(self))
        axes.barh(places, [min(each.shape) for each in self], color="#BBBBBB", alpha=0.6, label="full rank")
        for k, (label, (marker, values)) in enumerate(marks.items()):
            known = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker, color=colour(k), label=label)
        axes.set_yticks(places, [each.name for each in self], fontsize="small")
        axes.invert_yaxis()
        axes.set(xlabel="directions", title="Capacity from input to output")
        logarithmic(axes)
        figure_of(axes).legend(loc="outside lower center", ncols=2, fontsize="small")
        return figure_of(axes)


def capacity(model: nn.Module, batches: Iterable[Any] | None = None, *, mask: MaskOf | None = None) -> Capacity:
    r"""Lists rank, condition number and intrinsic dimension of every layer, from input to output.

    A layer of small rank, or of a large condition number, limits what all later ones can tell apart. With data the
    layers are in the order in which they run, and the dimension of their outputs is that of real inputs: the
    participation ratio :math:`(\sum v_i)^2 / \sum v_i^2` of the variances of the principal components (Gao et al.,
    2017). Without, they are in the order in which the model holds them.

    Args:
        model: the model; it is not changed.
        batches: tensors, tuples of inputs, or dicts of keyword arguments; ``None`` looks at the weights alone.
        mask: how the mask of a batch is found, as in :func:`calibrate`.

    Raises:
        LowRankError: for what :func:`weight_spectrum` and :func:`activation_spectrum` refuse.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), lr.LowRankLinear(30, 30, rank=4), nn.Linear(30, 10))
        >>> [layer.rank for layer in lr.capacity(model)]
        [20, 4, 10]
        >>> lr.capacity(model).bottleneck.name
        '2'
    """
    weights = weight_spectrum(model)
    dimensions = {}
    if batches is not None:
        dimensions = {each.name: each.participation_ratio for each in activation_spectrum(model, batches, mask=mask)}
    order = [*dimensions, *(layer.name for layer in weights if layer.name not in dimensions)]
    return Capacity(tuple(_layer(weights[name], dimensions.get(name)) for name in order))


def _layer(found: LayerSpectrum, dimension: float | None) -> LayerCapacity:
    raw = found.raw
    return LayerCapacity(found.name, raw.shape, found.rank, raw.condition_number, raw.participation_ratio, dimension)
