"""Taking the second moments of one layer's inputs and output gradients, call by call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..layers import ConvNd, is_embedding, linear_shape, weight_of
from ..layers.patches import output_rows
from .clipping import clipped
from .layer_stats import LayerStats
from .loss_scale import LossScale
from .masks import DataRows, masked_input_rows
from .moments import Moments
from .padding import Padding, in_backward
from .patch_moments import patch_sums
from .run import layer_input
from .sketch import GradientSketch, is_sketched


@dataclass
class Pass:
    """What all layers have to know of the forward or backward pass that is running.

    Args:
        padding: the masks of the pass.
        starts_gradients: whether layers whose inputs need no gradients start a graph of gradients.
        samples: how many samples the batch has.
        scale: the scale of its loss.
        place: what comes first in the order of calibration, where calls are taken in another order.
        dtype: dtype of the moments of gradients; those of inputs are in fp64, since their mean is taken off.
        widest: above how many outputs the moments of gradients are sketched; ``None`` for never.
        clip: how long rows of inputs may be, over the median of their lengths; ``None`` for any length.
    """

    padding: Padding
    starts_gradients: bool = False
    samples: int = 0
    scale: LossScale = field(default_factory=LossScale)
    place: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float64
    widest: int | None = None
    clip: float | None = None


class LayerRecorder:
    """The moments of one layer, taken by a forward hook.

    Args:
        current: the pass that is running.
        leader: who takes the inputs of a layer that was called before this one, with the same tensors; its moments are
            this layer's too.

    Attributes:
        stats: what was taken; ``None`` before the first call.
    """

    def __init__(self, current: Pass, leader: LayerRecorder | None = None) -> None:
        self.stats: LayerStats | None = None
        self._pass, self._leader = current, leader
        self._calls = 0
        self._last: tuple[weakref.ref[Tensor], int, int, DataRows | None] | None = None
        self._gradients: Moments | GradientSketch | None = None
        self._traced = False
        self._rows = 0
        self._place = (0, 0)  # of the call whose input shape is kept
        self._data_rows: dict[int, DataRows] = {}  # of this pass, by the number of rows that the output has

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Takes the inputs in, and watches for the gradient of the output."""
        again = in_backward()  # a recomputation shows nothing new, but has the gradients where it is reentrant
        rows = None if again else self._take(module, layer_input(args, kwargs))
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        root = self._pass.starts_gradients and torch.is_grad_enabled() and not output.requires_grad
        if root:
            # nothing before it has gradients; a copy, since a leaf may not be changed in place
            output = output.detach().requires_grad_().clone()
        if output.requires_grad:
            self._traced = True
            self._pass.scale.needed |= output.dtype == torch.float16
            output.register_hook(self._watch_gradient(module, rows, again))
        return output if root else None

    def start_pass(self) -> None:
        """Forgets which rows of the last pass were data."""
        self._data_rows.clear()

    def finish(self, samples: int) -> None:
        """Completes the statistics of the layer, over so many samples of the model."""
        if self._leader is not None and self._leader._calls != self._calls:
            raise self.parted()
        if self.stats is not None:
            if self._gradients is not None:
                self.stats.gradients, self.stats.gradient_rows = self._gradients.second, self._gradients.rows
            self.stats.traced = self._traced
            self.stats.positions = self.stats.inputs.rows / samples
            self.stats.repeats = self._rows / self.stats.rows_per_input / samples

    @property
    def moments(self) -> Moments:
        """The moments of the inputs."""
        assert self.stats is not None
        return self.stats.inputs

    def taken_of(self, x: Tensor, found: DataRows | None, calls: int) -> int:
        """Returns how many rows its own last call took of a tensor.

        Args:
            x: the tensor.
            found: which of its rows are data.
            calls: the number of calls that there have to be.

        Raises:
            LowRankError: if the last call was given another tensor.
        """
        if self._last is not None and self._calls == calls:
            last, version, taken, rows = self._last
            if last() is x and version == x._version and _are_same(rows, found):
                return taken
        raise self.parted()

    @staticmethod
    def parted() -> LowRankError:
        """What is raised where layers that share moments are given different tensors."""
        return LowRankError(
            "calibrate: two layers of a stage were given the same tensor for the first batch, and not for another one;"
            " calibrate without folder=."
        )

    @staticmethod
    def _new_moments(module: nn.Module) -> Moments:
        groups, _, size = linear_shape(module)
        return Moments.zeros(size, weight_of(module).device, groups=groups, diagonal=is_embedding(module))

    def _update(self, module: nn.Module, batched: Tensor, found: DataRows | None) -> int:
        """Adds the rows of an input that are data to the moments; returns how many there are."""
        before = self.moments.rows
        if not is_embedding(module):
            known = patch_sums(module, batched) if found is None else None
            if known is not None:
                self.moments.add(*known)
                return known[2]
            for part in masked_input_rows(module, batched, found):
                self.moments.update(*clipped(module, self._pass.clip, part))
            return self.moments.rows - before
        indices = batched if found is None else batched[found.inputs]
        taken = indices.numel()
        if isinstance(module, nn.EmbeddingBag) and module.padding_idx is not None:
            indices = indices[indices != module.padding_idx]  # no part of its bag
        self.moments.update_counts(indices)
        return taken

    @torch.no_grad()
    def _take(self, module: nn.Module, x: Tensor) -> DataRows | None:
        batched = as_batch(module, x.detach())
        found = self._pass.padding.of(module, x, batched)
        if self.stats is None:
            moments = self._new_moments(module) if self._leader is None else self._leader.moments
            self.stats = LayerStats(moments, input_shape=tuple(batched.shape[1:]))
        self._calls += 1
        if self._leader is None:
            taken = self._update(module, batched, found)
            self._last = weakref.ref(x), x._version, taken, found
        else:
            taken = self._leader.taken_of(x, found, self._calls)
        if taken and (not self._rows or self._pass.place < self._place):
            self._place = self._pass.place
            self.stats.rows_per_input = max(1, taken // len(batched) if found is None else found.longest)
            self.stats.input_shape = tuple(batched.shape[1:]) if found is None else found.sample
        self._rows += taken
        if found is not None:
            self._data_rows[found.outputs.numel()] = found
        return found

    def _watch_gradient(self, module: nn.Module, found: DataRows | None, again: bool) -> Callable[[Tensor], None]:
        samples = self._pass.samples

        def hook(gradient: Tensor) -> None:
            gradient = gradient.detach()
            if self._pass.scale.is_measuring(gradient):
                return
            rows = output_rows(module, gradient)
            data = self._data_rows.get(rows.shape[-2]) if again else found
            rows = rows if data is None else rows[..., data.outputs.flatten(), :]
            if self._gradients is None:
                groups = rows.shape[0] if rows.ndim == 3 else 1
                size, dtype = rows.shape[-1], self._pass.dtype
                if groups == 1 and is_sketched(size, self._pass.widest):
                    self._gradients = GradientSketch(size, rows.device, dtype)
                else:
                    self._gradients = Moments.zeros(size, rows.device, groups=groups, dtype=dtype)
            # the loss is a mean over the batch; the moment is that of one sample's loss
            self._gradients.update(rows * (samples / self._pass.scale.value))

        return hook


def _are_same(one: DataRows | None, other: DataRows | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.inputs, other.inputs)


def as_batch(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the input of a layer with a batch dimension, which torch's layers do without."""
    return x if x.ndim > 1 + (len(module.kernel_size) if isinstance(module, ConvNd) else 0) else x[None]
