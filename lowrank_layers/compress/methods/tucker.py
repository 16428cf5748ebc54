"""Tucker-2 for convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce as fold_left
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...cost import Cost
from ...layers import FactoredModule, TuckerConv2d
from ...layers.base import fill
from ...layers.tucker import choose_tucker_rank, tucker_limits
from ...linalg import exact_svd, leading_eigenvectors, mode_product, unfold
from ...moments import LayerStats
from .base import Option, factored_cost, has_bias, matches_type, repeated_cost
from .regression import Regression
from .weighting import weighted_kernel


@dataclass(frozen=True)
class TuckerMethod:
    """Reduce the channels, convolve, expand.

    The reduction is the leading input subspace of the kernel, weighted by channel moments and curvature; given that,
    core and expansion are the optimum of the weighted regression.

    Args:
        steps: how many input ranks are considered.
    """

    name: ClassVar[str] = "tucker"

    steps: int = 10

    @property
    def layers(self) -> Mapping[type[nn.Module], type[FactoredModule]]:
        """Dense type to the factored type that replaces it."""
        return {nn.Conv2d: TuckerConv2d}

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer: a 1 x 1 kernel has nothing between the channel modes."""
        return matches_type(self, module) and max(module.kernel_size) > 1  # type: ignore[arg-type]

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """All output ranks at a handful of input ranks, where smaller than the dense layer."""
        assert isinstance(module, nn.Conv2d)
        problem = Regression.of(module, stats)
        top_out, top_in = tucker_limits(tuple(module.weight.shape))
        inputs = sorted({max(1, round(top_in * k / self.steps)) for k in range(1, self.steps + 1)})
        dense = repeated_cost(module, stats)
        price = _bilinear(self, module, stats)
        basis = _input_basis(module, problem)
        options = []
        for r_in in inputs:
            left = problem.after(_features(module, basis[:, :r_in]))
            captured = torch.cat([torch.zeros(1, dtype=torch.float64), left.singular_values().square().cumsum(0).cpu()])
            losses = (problem.energy - 0.5 * problem.scale * captured).clamp_min(0).tolist()
            for r_out in range(1, min(top_out, len(losses) - 1) + 1):
                options.append(Option((r_out, r_in), price(r_out, r_in), losses[r_out]))
        return [option for option in options if option.cost.params < dense.params]

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> tuple[int, int]:
        """The ranks that integers or rules mean, on the weighted kernel where there are statistics."""
        assert isinstance(module, nn.Conv2d)
        kernel = weighted_kernel(module, Regression.of(module, stats))[0]
        return choose_tucker_rank(rank, tuple(module.weight.shape), kernel, TuckerConv2d.__name__)

    def build(self, module: nn.Module, rank: Any, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        assert isinstance(module, nn.Conv2d)
        if stats is None:
            return TuckerConv2d.from_dense(module, rank=rank)
        r_out, r_in = choose_tucker_rank(rank, tuple(module.weight.shape), None, TuckerConv2d.__name__)
        problem = Regression.of(module, stats)
        reduce = _input_basis(module, problem, r_out)[:, :r_in]
        features = _features(module, reduce)
        expand, core = problem.after(features).pair(r_out)
        layer = TuckerConv2d.like(module, rank=(r_out, r_in), bias=has_bias(module, stats))
        return fill(layer, [reduce.mT, core, expand], problem.corrected_bias(expand @ core @ features))


def _input_basis(conv: nn.Conv2d, problem: Regression, r_out: int | None = None) -> Tensor:
    """Directions of the input channels, the most useful first, ``[in, in]``: ``z = basis^T x``.

    With ``r_out`` only what the leading output directions use counts (one step of HOOI).
    """
    kernel, root = weighted_kernel(conv, problem)
    if r_out is not None:
        u = exact_svd(unfold(kernel, 0))[0][:, :r_out]
        kernel = mode_product(kernel, u.mT, 0)
    matrix = unfold(kernel, 1)
    return root.divide(leading_eigenvectors(matrix @ matrix.mT, len(matrix)))


def _features(conv: nn.Conv2d, reduce: Tensor) -> Tensor:
    """The reduction as a map of patches: ``reduce^T`` at every position of the kernel, ``[r*area, in*area]``."""
    area = conv.kernel_size[0] * conv.kernel_size[1]
    eye = torch.eye(area, dtype=reduce.dtype, device=reduce.device)
    return torch.kron(reduce.mT.contiguous(), eye)


def _bilinear(method: TuckerMethod, conv: nn.Conv2d, stats: LayerStats | None) -> Any:
    """The cost at any pair of ranks: bilinear, hence known from four."""
    corner = {(a, b): factored_cost(method, conv, (a, b), stats) for a in (1, 2) for b in (1, 2)}

    def times(cost: Cost, k: int) -> Cost:
        return Cost(cost.params * k, cost.macs * k, cost.bytes * k)

    def price(r_out: int, r_in: int) -> Cost:
        a, b = r_out - 1, r_in - 1
        weights = {(1, 1): (1 - a) * (1 - b), (2, 1): a * (1 - b), (1, 2): (1 - a) * b, (2, 2): a * b}
        return fold_left(add, (times(corner[key], weight) for key, weight in weights.items()))

    return price
