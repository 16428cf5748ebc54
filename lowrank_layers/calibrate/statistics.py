"""The statistics of every layer that calibration has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .moments import Moments


@dataclass
class LayerStats:
    """Second moments of the inputs and of the output gradients of one layer.

    Args:
        inputs: moments of the inputs (a convolution's patches, group by group). When ``cross`` is given, they are those
            of the inputs that the already compressed prefix delivers.
        gradients: ``E[g g^T]`` of the loss's gradients at the output, ``[m, m]``, or ``None``.
        input_shape: shape of one sample's input, without the batch.
        positions: rows per sample of the model, summed over calls; padding is not counted.
        repeats: inputs of ``input_shape`` per sample of the model: one per call of a shared layer, and less where other
            samples have fewer positions.
        cross: ``E[x x'^T] - E[x] E[x']^T`` of the dense model's inputs ``x`` and the compressed one's ``x'``.
        target_mean: ``E[x]``.
        traced: whether its outputs were part of a graph of gradients (not so under ``torch.no_grad``).
        free_bias: whether the factored layer may have a bias where the dense one has none.
    """

    inputs: Moments
    gradients: Tensor | None = None
    input_shape: tuple[int, ...] | None = None
    positions: float = 1.0
    repeats: float = 1.0
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    traced: bool = True
    free_bias: bool = True

    def group(self, index: int) -> LayerStats:
        """Returns the statistics of one group of a grouped convolution.

        Args:
            index: the group.
        """
        if self.inputs.mean.ndim == 1:
            return self
        parts = (None if t is None else t[index] for t in (self.gradients, self.cross, self.target_mean))
        gradients, cross, target_mean = parts
        inputs = self.inputs.group(index)
        return replace(self, inputs=inputs, gradients=gradients, cross=cross, target_mean=target_mean)


@dataclass
class Statistics(Mapping[str, LayerStats]):
    """The :class:`LayerStats` of every layer by name, and how they were taken.

    Args:
        layers: the statistics of every calibrated layer that was called.
        samples: how many samples were seen.
        with_target: whether the last item of a tuple batch is the target.
        other_macs: MACs per sample of layers that are counted but not calibrated (those with a computed weight).
        mask: how the padding of a batch is found, as given to :func:`calibrate`.
        example: the first sample of the first batch, as a batch of one; ``None`` where someone else ran the model.
    """

    layers: dict[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    with_target: bool = False
    other_macs: int = 0
    mask: str | Callable[[Any], Tensor] | None = field(default=None, repr=False, compare=False)
    example: Any = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerStats:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
