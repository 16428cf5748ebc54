"""Block tensor trains for large embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...decompose.block_tt import block_trains
from ...decompose.bonds import choose_bonds, train_size, uniform_bonds
from ...decompose.digits import Split, digit_marginals, split_digits
from ...layers import FactoredModule, TensorizedEmbedding, weight_of
from ...layers.tt_embedding import padding_is_zero
from ...linalg import check_tensor, train_product
from ..candidates import Candidate
from ..method import Option, factored_cost, layer_for
from ..regression import Regression


@dataclass(frozen=True)
class TensorizedMethod:
    r"""Replaces a large embedding by a tensor train over the digits of its indices, by TT-SVD.

    TT-SVD is quasi-optimal: within :math:`\sqrt{2}` of the best train of three cores in the norm in which it works.
    That norm can weight digits, not rows: frequencies of the rows and curvatures of the columns enter as the product of
    their marginals over the digits, which the cores take back exactly. The estimate is the true weighted error of the
    train that :meth:`build` returns, row by row. The largest unfolding is decomposed once for all options.

    Args:
        min_rows: smaller embeddings get no options: their trains save little and cost more steps per lookup.
        steps: number of ranks considered, in geometric progression.
    """

    name: ClassVar[str] = "tensorized"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (TensorizedEmbedding,)

    min_rows: int = 10_000
    steps: int = 6

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer; a padding row that is not zero cannot be kept."""
        module = layer.module
        return layer_for(self, module) is not None and isinstance(module, nn.Embedding) and padding_is_zero(module)

    def options(self, layer: Candidate) -> list[Option]:
        """Returns a handful of bonds at which the train is smaller than the embedding; losses fall with the size."""
        weight, padding = _weight(layer.module), layer.module.padding_idx
        split = _split(weight)
        ladder = [bonds for bonds in uniform_bonds(split) if train_size(bonds, split) < weight.numel()]
        if len(weight) < self.min_rows or not ladder:
            return []
        steps = {round(len(ladder) ** (k / self.steps)) for k in range(1, self.steps + 1)}
        bonds = [ladder[step - 1] for step in sorted(steps)]
        (problem,) = layer.problems
        options: list[Option] = []
        for rank, cores in zip(bonds, _trains(layer, split, bonds), strict=True):
            approximate = train_product(cores)[: len(weight)]
            if isinstance(padding, int):
                approximate[padding] = 0
            loss = problem.loss(approximate.mT)
            if not options or loss < options[-1].loss_increase:
                options.append(Option(rank, factored_cost(self, layer, rank), loss))
        return options

    def choose(self, layer: Candidate, rank: Any) -> tuple[int, ...]:
        """Returns the bonds that an integer, a tuple or a rule on sizes means."""
        weight = _weight(layer.module)
        return choose_bonds(rank, _split(weight), weight.numel(), TensorizedEmbedding.__name__)

    def build(self, layer: Candidate, rank: Any) -> FactoredModule:
        """The factored layer; with statistics the train in the norm that the digits' marginals give."""
        if layer.stats is None:
            return TensorizedEmbedding.from_dense(layer.module, rank=rank)
        weight = _weight(layer.module)
        split = _split(weight)
        (cores,) = _trains(layer, split, [self.choose(layer, rank)])
        return TensorizedEmbedding.from_cores(layer.module, cores)


def _weight(module: nn.Module) -> Tensor:
    return check_tensor(weight_of(module), TensorizedEmbedding.__name__, ndim=2)


def _split(weight: Tensor) -> Split:
    rows, columns = weight.shape
    return split_digits(rows, columns, 3, TensorizedEmbedding.__name__)


def _trains(layer: Candidate, split: Split, bonds: Sequence[tuple[int, ...]]) -> Iterator[list[Tensor]]:
    """The cores at each choice of bonds, in the norm that the digits' marginals give."""
    scales = None
    if layer.stats is not None:
        (problem,) = layer.problems
        rows, columns = (digit_marginals(w, side) for w, side in zip(_importances(problem), split, strict=True))
        scales = [torch.outer(r, c).sqrt() for r, c in zip(rows, columns, strict=True)]
    padding: Any = layer.module.padding_idx
    return block_trains(_weight(layer.module), split, bonds, scales=scales, free_row=padding)


def _importances(problem: Regression) -> tuple[Tensor, Tensor]:
    """The importance of each row and of each column of the embedding: its frequency, the curvature at that output."""
    return problem.inputs.matrix, problem.outputs.diagonal
