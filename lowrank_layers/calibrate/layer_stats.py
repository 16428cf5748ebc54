"""The statistics of one layer that calibration has taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .moments import Moments
from .readable import Readable


@dataclass
class LayerStats:
    """Second moments of the inputs and of the output gradients of one layer.

    Args:
        inputs: moments of the inputs (a convolution's patches, group by group). When ``cross`` is given, they are those
            of the inputs that the already compressed prefix delivers.
        gradients: ``E[g g^T]`` of the loss's gradients at the output, ``[m, m]``, or a sketch of it (``sketch.py``), or
            ``None``.
        input_shape: shape of one sample's input, without the batch.
        positions: rows per sample of the model, summed over calls; padding is not counted.
        repeats: inputs of ``input_shape`` per sample of the model: one per call of a shared layer, and less where other
            samples have fewer positions.
        cross: ``E[x x'^T] - E[x] E[x']^T`` of the dense model's inputs ``x`` and the compressed one's ``x'``.
        target_mean: ``E[x]``.
        traced: whether its outputs were part of a graph of gradients (not so under ``torch.no_grad``).
        free_bias: whether the factored layer may have a bias where the dense one has none.
        rows_per_input: rows of one input of ``input_shape``.
        gradient_rows: how many rows of output gradients went in; ``None`` for as many as inputs.
    """

    inputs: Moments
    gradients: Readable[Tensor | None] = Readable(None)
    input_shape: tuple[int, ...] | None = None
    positions: float = 1.0
    repeats: float = 1.0
    cross: Readable[Tensor | None] = Readable(None)
    target_mean: Readable[Tensor | None] = Readable(None)
    traced: bool = True
    free_bias: bool = True
    rows_per_input: int = 1
    gradient_rows: int | None = None

    def changed(self, **fields: Any) -> LayerStats:
        """Returns a copy with other values of some fields; what is in a file, and not read yet, stays there.

        Args:
            **fields: the new values, by name.
        """
        return LayerStats(**{**vars(self), **fields})

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
        return self.changed(inputs=inputs, gradients=gradients, cross=cross, target_mean=target_mean)
