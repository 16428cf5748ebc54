"""Block tensor trains for linear layers, on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...decompose.block_tt import block_trains
from ...decompose.bonds import Bonds, choose_bonds, uniform_bonds
from ...decompose.digits import Split, digit_marginals, split_exactly
from ...layers import FactoredModule, TensorizedLinear, weight_of
from ...linalg import check_tensor, train_product
from ..candidates import Candidate
from ..method import Option, factored_cost, layer_for, smaller_ranks, spread
from ..regression import joint_bias


@dataclass(frozen=True)
class TensorizedLinearMethod:
    r"""Replaces a linear layer by a sum of Kronecker products, a tensor train of two cores over its indices' digits.

    The result is made to be trained: at the same number of parameters its loss is far above that of a pair of factors
    before recovery, and may be far below it afterwards. A plan chooses by the loss before, so that by default there are
    no options: name the method, ``plan.set_rank(name, rank, method="tensorized_linear")``, or ask for options.

    With statistics the train is the best one in the norm that the marginals of the curvature's and of the inputs'
    diagonals over the digits give (Van Loan and Pitsianis, 1993); the estimate is the true weighted error.

    Args:
        steps: number of ranks considered in planning; with 0 a layer is replaced on request only.
    """

    name: ClassVar[str] = "tensorized_linear"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (TensorizedLinear,)

    steps: int = 0

    @property
    def on_request(self) -> bool:
        """True if plans do not consider it by themselves, so that its layers are not timed either."""
        return self.steps == 0

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer."""
        return layer_for(self, layer.module) is not None

    def options(self, layer: Candidate) -> list[Option]:
        """Returns ``steps`` ranks at which the train is smaller than the matrix; losses fall with the size."""
        if self.on_request:
            return []
        split = _split(_weight(layer.module))
        top = len(smaller_ranks(self, layer, len(uniform_bonds(split))))
        bonds = [(rank,) for rank in spread(top, self.steps, layer.round_to)]
        (problem,) = layer.problems
        options: list[Option] = []
        for rank, cores in zip(bonds, _trains(layer, split, bonds), strict=True):
            loss = problem.loss(train_product(cores))
            if not options or loss < options[-1].loss_increase:
                options.append(Option(rank, factored_cost(self, layer, rank), loss))
        return options

    def choose(self, layer: Candidate, rank: Any) -> Bonds:
        """Returns the bonds that an integer, a tuple or a rule on sizes means."""
        weight = _weight(layer.module)
        return choose_bonds(rank, _split(weight), weight.numel(), TensorizedLinear.__name__)

    def build(self, layer: Candidate, rank: Any) -> FactoredModule:
        """The factored layer; with statistics the train in the norm that the digits' marginals give."""
        if layer.stats is None:
            return TensorizedLinear.from_dense(layer.module, rank=rank)
        (cores,) = _trains(layer, _split(_weight(layer.module)), [self.choose(layer, rank)])
        bias = joint_bias(layer.problems, [train_product(cores).double()])
        return TensorizedLinear.from_cores(layer.module, cores, bias)


def _weight(module: nn.Module) -> Tensor:
    return check_tensor(weight_of(module), TensorizedLinear.__name__, ndim=2)


def _split(weight: Tensor) -> Split:
    rows, columns = weight.shape
    return split_exactly(rows, columns, 2, TensorizedLinear.__name__)


def _trains(layer: Candidate, split: Split, bonds: Sequence[Bonds]) -> Iterator[list[Tensor]]:
    """The cores at each choice of bonds, in the norm that the digits' marginals give."""
    scales = None
    if layer.stats is not None:
        (problem,) = layer.problems
        sides = problem.outputs.diagonal, problem.inputs.diagonal
        rows, columns = (digit_marginals(weights, sizes) for weights, sizes in zip(sides, split, strict=True))
        scales = [torch.outer(r, c).sqrt() for r, c in zip(rows, columns, strict=True)]
    return block_trains(_weight(layer.module), split, bonds, scales=scales)
