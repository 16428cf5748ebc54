"""Block tensor trains for large tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...decompose.block_tt import block_trains
from ...decompose.bonds import choose_bonds, train_size, uniform_bonds
from ...decompose.digits import Split, split_digits
from ...layers import FactoredModule, TensorizedEmbedding, weight_of
from ...layers.tt_embedding import padding_is_zero
from ...linalg import Root, check_tensor, train_product
from .base import Option, factored_cost, layer_for
from .regression import Regression, regressions


@dataclass(frozen=True)
class TensorizedMethod:
    r"""Tables as tensor trains, by TT-SVD: for those whose structure lies along the digits, not in their matrix rank.

    TT-SVD is quasi-optimal: within :math:`\sqrt{2}` of the best train of three cores in the norm in which it works.
    That norm can weight digits, not rows: frequencies of the rows and curvatures of the columns enter as the product of
    their marginals over the digits, which the cores take back exactly. The estimate is the true weighted error of the
    train that :meth:`build` returns, row by row. The largest unfolding is decomposed once for all options.

    Args:
        min_rows: smaller tables get no options: their trains save little and cost more steps a lookup.
        steps: how many ranks are considered, in geometric progression.
    """

    name: ClassVar[str] = "tensorized"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (TensorizedEmbedding,)

    min_rows: int = 10_000
    steps: int = 6

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer, whatever its size; a padding row that is not zero cannot be kept."""
        return layer_for(self, module) is not None and isinstance(module, nn.Embedding) and padding_is_zero(module)

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """A handful of bonds, smaller than the dense layer; what loses more than a smaller one is left out."""
        table = _table(module)
        split = _split(table)
        ladder = [bonds for bonds in uniform_bonds(split) if train_size(bonds, split) < table.numel()]
        if len(table) < self.min_rows or not ladder:
            return []
        steps = {round(len(ladder) ** (k / self.steps)) for k in range(1, self.steps + 1)}
        bonds = [ladder[step - 1] for step in sorted(steps)]
        (problem,) = regressions(module, stats)
        options: list[Option] = []
        for rank, cores in zip(bonds, _trains(module, split, bonds, problem, stats), strict=True):
            approximate = train_product(cores)[: len(table)]
            if module.padding_idx is not None:
                approximate[module.padding_idx] = 0  # type: ignore[index]
            loss = problem.loss(approximate.mT)
            if not options or loss < options[-1].loss_increase:
                options.append(Option(rank, factored_cost(self, module, rank, stats), loss))
        return options

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> tuple[int, ...]:
        """The bonds that an integer, a tuple or a rule on sizes means."""
        table = _table(module)
        return choose_bonds(rank, _split(table), table.numel(), TensorizedEmbedding.__name__)

    def build(self, module: nn.Module, rank: Any, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the train in the norm that the digits' marginals give."""
        if stats is None:
            return TensorizedEmbedding.from_dense(module, rank=rank)
        table = _table(module)
        split = _split(table)
        (problem,) = regressions(module, stats)
        (cores,) = _trains(module, split, [self.choose(module, stats, rank)], problem, stats)
        return TensorizedEmbedding.from_cores(module, cores)


def _table(module: nn.Module) -> Tensor:
    return check_tensor(weight_of(module), TensorizedEmbedding.__name__, ndim=2)


def _split(table: Tensor) -> Split:
    rows, columns = table.shape
    return split_digits(rows, columns, 3, TensorizedEmbedding.__name__)


def _trains(
    module: nn.Module, split: Split, bonds: Sequence[tuple[int, ...]], problem: Regression, stats: LayerStats | None
) -> Iterator[list[Tensor]]:
    scales = None
    if stats is not None:
        rows, columns = (_marginals(w, side) for w, side in zip(_weights(problem), split, strict=True))
        scales = [torch.outer(r, c).sqrt() for r, c in zip(rows, columns, strict=True)]
    return block_trains(_table(module), split, bonds, scales=scales, free_row=module.padding_idx)  # type: ignore[arg-type]


def _weights(problem: Regression) -> tuple[Tensor, Tensor]:
    """How much a row and a column of the table matter: its frequency, and the curvature at that output."""
    return problem.moment, _diagonal(problem.output)


def _diagonal(root: Root) -> Tensor:
    squares = root.factor.square()
    return squares if squares.ndim == 1 else squares.sum(0)


def _marginals(weights: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The weight of each value of each digit, one on average; their product is the best one that digits can give."""
    full = weights.new_zeros(torch.Size(sizes).numel())
    full[: len(weights)] = weights
    full = full.reshape(sizes)
    sums = [full.sum([other for other in range(len(sizes)) if other != axis]) for axis in range(len(sizes))]
    return [(each / each.mean()).clamp_min(1e-6) for each in sums]
