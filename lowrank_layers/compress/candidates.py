"""One layer in planning: its weighted problems, costs and energies, computed lazily and once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.readable import own_copy
from ..calibrate.statistics import LayerStats
from ..cost import Cost
from ..errors import LowRankError
from ..layers import bias_of, is_transposed, matrices_of, takes_bias
from ..layers.kernel import kernel_of
from ..linalg import Root, damp, fold, psd_root, unfold
from ..memory import release_mapped
from .cost_model import CostModel, CountedCost
from .damping import Damping
from .regression import Metric, Regression, add_ridge_, diagonal_of, to_diagonal_

TRIMMED = 0.01
"""Fraction of a layer's singular directions that may be outliers."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A dense layer with everything that planning knows of it.

    Every :class:`Method` is given one. All is computed lazily and once, so that methods which compete for a layer share
    it. :meth:`release` lets go of the big matrices; energies, tails and prices stay.

    Args:
        module: the dense layer.
        stats: its statistics, where the model was calibrated.
        damping: ridges on the moments in the statistics.
        cost_model: prices the layer and its options.
        idle: True if the loss does not depend on this layer, although it depends on others.
        round_to: ranks are multiples of it, where a method does not offer all ranks anyway.
        outputs: the metric of each group's outputs, where it is computed already; by default it is that of ``stats``.

    Examples:
        >>> layer = lr.Candidate(nn.Linear(64, 32))
        >>> option = lr.SVDMethod().options(layer)[3]
        >>> option.rank, option.cost.params, layer.before.params
        (4, 416, 2080)
    """

    module: nn.Module
    stats: LayerStats | None = None
    damping: Damping = field(default=Damping(), kw_only=True)
    cost_model: CostModel = field(default=CountedCost(), kw_only=True)
    idle: bool = field(default=False, kw_only=True)
    round_to: int = field(default=1, kw_only=True)
    outputs: Sequence[Metric | None] | None = field(default=None, kw_only=True, repr=False)

    @cached_property
    def before(self) -> Cost:
        """Cost of the dense layer."""
        return self.cost_model.cost(self.module, self.stats)

    @cached_property
    def prices(self) -> dict[tuple[Any, Any], Cost]:
        """Costs of the factored layers that methods have asked for, by method and rank."""
        return {}

    @property
    def has_bias(self) -> bool:
        """True if the factored layer has a bias, which corrects the output's mean once the input means are known."""
        free = self.stats is not None and self.stats.free_bias
        return bias_of(self.module) is not None or (free and takes_bias(self.module))

    @cached_property
    def problems(self) -> tuple[Regression, ...]:
        """The weighted problems of the layer's matrices, one per group; a layer without groups has one."""
        return self._problems_of(matrices_of(self.module))

    @cached_property
    def kernel_problems(self) -> tuple[Regression, ...]:
        """The problems of a convolution's kernels ``[out, in * area]``, one per group.

        Without statistics the error does not depend on the layout, so that a transposed convolution has them too.
        """
        if not is_transposed(self.module):
            return self.problems
        assert self.stats is None, "the patches that a transposed convolution makes overlap"
        return self._problems_of(kernel_of(self.module).detach().flatten(2))

    @cached_property
    def weighted_kernels(self) -> tuple[tuple[Tensor, Root], ...]:
        """Each group's kernel weighted on both channel modes, and the root of the input channels' own moment."""
        return tuple(_weighted_kernel(self.module, problem) for problem in self.kernel_problems)

    @cached_property
    def tails(self) -> list[Tensor]:
        """Estimated growth of the loss at rank 0, 1, 2, ... of a pair of factors, group by group."""
        return [problem.tails for problem in self.problems]

    @property
    def energy(self) -> float:
        """Estimated growth of the loss if nothing of the layer but its output's mean were left."""
        return sum(float(tails[0]) for tails in self.tails)

    @property
    def trimmed_energy(self) -> float:
        """The energy without the largest singular directions: 1 % of them, at least one per group."""
        return sum(float(tails[max(1, round(TRIMMED * (len(tails) - 1)))]) for tails in self.tails)

    def release(self) -> None:
        """Lets go of the problems with their matrices and roots; they are computed anew if they are asked for again."""
        for name in ("problems", "kernel_problems", "weighted_kernels"):
            self.__dict__.pop(name, None)
        release_mapped(self.module.parameters())

    def _problems_of(self, matrices: Tensor) -> tuple[Regression, ...]:
        bias = bias_of(self.module)
        biases = [None] * len(matrices) if bias is None else bias.detach().double().unflatten(0, (len(matrices), -1))
        pairs = zip(matrices.double(), biases, strict=True)
        if self.stats is None:
            return tuple(Regression.plain(weight, bias) for weight, bias in pairs)
        outputs = self.outputs or [None] * len(matrices)
        return tuple(
            self._weighted(weight, bias, self.stats.group(k), outputs[k]) for k, (weight, bias) in enumerate(pairs)
        )

    def _weighted(self, weight: Tensor, bias: Tensor | None, stats: LayerStats, outputs: Metric | None) -> Regression:
        """The problem of one matrix; its map goes through the origin where the layer cannot have a bias."""
        rows, columns = weight.shape
        device = weight.device
        if len(stats.inputs.mean) != columns:
            raise LowRankError(
                f"got statistics of {len(stats.inputs.mean)} inputs for a layer of {columns};"
                " calibrate this model, not another one."
            )
        mean = stats.inputs.mean.to(device)
        target = mean if stats.target_mean is None else stats.target_mean.to(device)
        centred = takes_bias(self.module) and self.has_bias
        cross = stats.cross
        moved = None if cross is None else weight @ cross.to(device)
        del cross  # before the next large moment is read
        moment = own_copy(stats.inputs, "second").to(device)
        if centred:
            moment.addr_(mean, mean, alpha=-1)
        diagonal = diagonal_of(moment).clone()
        variance = diagonal.mean()
        ridge = self.damping.inputs * variance if variance > 0 else torch.ones_like(variance)
        share = self.damping.input_shrinkage
        if moved is not None:
            moved = moved if centred else moved.addr_(weight @ target, mean)
            moved = moved.mul_(1 - share).addcmul_(weight, share * diagonal + ridge)
        return Regression(
            weight,
            bias,
            outputs or Metric.of_outputs(stats, self.damping, device) or Metric.identity(rows, device),
            Metric(add_ridge_(to_diagonal_(moment, share), ridge)),
            moved,
            mean if centred else None,
            target if centred else None,
            stats.positions,
        )


def _weighted_kernel(conv: nn.Module, problem: Regression) -> tuple[Tensor, Root]:
    """One group's kernel weighted on both channel modes, and the root of the channels' own moment.

    The moment of patches does not separate into channels and positions; its channel blocks are averaged.
    """
    shape = kernel_of(conv).shape[1:]
    out, channels = shape[:2]
    area = problem.weight.shape[1] // channels
    kernel = problem.weight.reshape(out, channels, area)
    moment = problem.inputs.matrix
    if moment.ndim == 1:
        channel = moment.reshape(channels, area).mean(1)
    else:
        blocks = moment.reshape(channels, area, channels, area)
        channel = damp(blocks.diagonal(dim1=1, dim2=3).mean(-1), 1e-6)
    root = psd_root(channel)
    kernel = problem.outputs.root.times(kernel.flatten(1)).reshape_as(kernel)
    return fold(root.times(unfold(kernel, 1)), 1, kernel.shape).reshape(shape), root
