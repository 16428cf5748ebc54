"""Tucker-2 for convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce as fold_left
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...cost import Cost
from ...layers import (
    FactoredModule,
    TuckerConv,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    is_transposed,
)
from ...layers.kernel import kernel_area, kernel_of
from ...layers.tucker import choose_tucker_rank, tucker_limits
from ...linalg import exact_svd, leading_eigenvectors, mode_product, unfold
from ...moments import LayerStats
from .base import Option, factored_cost, layer_for, repeated_cost
from .regression import Regression, joint_bias
from .weighting import kernel_problems, weighted_kernel


@dataclass(frozen=True)
class TuckerMethod:
    """Reduce the channels, convolve, expand.

    The reduction is the leading input subspace of the kernel, weighted by channel moments and curvature; given that,
    core and expansion are the optimum of the weighted regression. With statistics transposed convolutions are left to
    other methods: the patches that they make overlap, and an output subspace of patches is none of channels.

    Args:
        steps: how many input ranks are considered.
    """

    name: ClassVar[str] = "tucker"
    form: ClassVar[dict[str, Any]] = {}
    layers: ClassVar[tuple[type[FactoredModule], ...]] = (
        TuckerConv1d,
        TuckerConv2d,
        TuckerConv3d,
        TuckerConvTranspose1d,
        TuckerConvTranspose2d,
        TuckerConvTranspose3d,
    )

    steps: int = 10

    def matches(self, module: nn.Module) -> bool:
        """Whether it can factorize this layer: a 1 x 1 kernel has nothing between the channel modes."""
        return layer_for(self, module) is not None and kernel_area(module) > 1

    def options(self, module: nn.Module, stats: LayerStats | None) -> list[Option]:
        """All output ranks at a handful of input ranks, where smaller than the dense layer."""
        if is_transposed(module) and stats is not None:
            return []
        top_out, top_in = tucker_limits(kernel_of(module).shape[1:])
        dense = repeated_cost(module, stats)
        price = _bilinear(self, module, stats)
        if price(1, 1).params >= dense.params:
            return []
        problems = kernel_problems(module, stats)
        energy = sum(problem.energy for problem in problems)
        bases = [_input_basis(module, problem) for problem in problems]
        inputs = sorted({max(1, round(top_in * k / self.steps)) for k in range(1, self.steps + 1)})
        options = []
        for r_in in inputs:
            losses = torch.full((top_out + 1,), energy, dtype=torch.float64)
            for problem, basis in zip(problems, bases, strict=True):
                left = problem.after(_features(module, basis[:, :r_in]))
                captured = left.singular_values().square().cumsum(0).cpu()[:top_out]
                losses[1 : len(captured) + 1] -= 0.5 * problem.scale * captured
            for r_out in range(1, min(top_out, len(captured)) + 1):
                options.append(Option((r_out, r_in), price(r_out, r_in), max(float(losses[r_out]), 0.0)))
        return [option for option in options if option.cost.params < dense.params]

    def choose(self, module: nn.Module, stats: LayerStats | None, rank: Any) -> tuple[int, int]:
        """The ranks that integers or rules mean, on the weighted kernel where there are statistics."""
        known = None if is_transposed(module) else stats
        kernels = [weighted_kernel(module, problem)[0] for problem in kernel_problems(module, known)]
        cls = layer_for(self, module)
        assert cls is not None
        return choose_tucker_rank(rank, tuple(kernels[0].shape), torch.stack(kernels), cls.__name__)

    def build(self, module: nn.Module, rank: Any, stats: LayerStats | None) -> FactoredModule:
        """The factored layer; with statistics the one that minimises the weighted error."""
        cls = layer_for(self, module)
        assert cls is not None
        assert issubclass(cls, TuckerConv)
        if stats is None or is_transposed(module):
            return cls.from_dense(module, rank=rank)
        shape = tuple(kernel_of(module).shape[1:])
        r_out, r_in = choose_tucker_rank(rank, shape, None, cls.__name__)
        problems = kernel_problems(module, stats)
        reduces = [_input_basis(module, problem, r_out)[:, :r_in] for problem in problems]
        features = [_features(module, reduce) for reduce in reduces]
        pairs = [problem.after(f).pair(r_out) for problem, f in zip(problems, features, strict=True)]
        products = [expand @ core @ f for (expand, core), f in zip(pairs, features, strict=True)]
        expands, cores = (torch.stack(side) for side in zip(*pairs, strict=True))
        core = cores.unflatten(2, (r_in, *shape[2:]))
        return cls.from_chain(module, torch.stack(reduces).mT, core, expands, joint_bias(problems, products))


def _input_basis(conv: nn.Module, problem: Regression, r_out: int | None = None) -> Tensor:
    """Directions of the input channels, the most useful first, ``[in, in]``: ``z = basis^T x``.

    With ``r_out`` only what the leading output directions use counts (one step of HOOI).
    """
    kernel, root = weighted_kernel(conv, problem)
    if r_out is not None:
        u = exact_svd(unfold(kernel, 0))[0][:, :r_out]
        kernel = mode_product(kernel, u.mT, 0)
    matrix = unfold(kernel, 1)
    return root.divide(leading_eigenvectors(matrix @ matrix.mT, len(matrix)))


def _features(conv: nn.Module, reduce: Tensor) -> Tensor:
    """The reduction as a map of patches: ``reduce^T`` at every position of the kernel, ``[r*area, in*area]``."""
    eye = torch.eye(kernel_area(conv), dtype=reduce.dtype, device=reduce.device)
    return torch.kron(reduce.mT.contiguous(), eye)


def _bilinear(method: TuckerMethod, conv: nn.Module, stats: LayerStats | None) -> Any:
    """The cost at any pair of ranks: bilinear, hence known from four."""
    corner = {(a, b): factored_cost(method, conv, (a, b), stats) for a in (1, 2) for b in (1, 2)}

    def times(cost: Cost, k: int) -> Cost:
        return Cost(cost.params * k, cost.macs * k, cost.bytes * k)

    def price(r_out: int, r_in: int) -> Cost:
        a, b = r_out - 1, r_in - 1
        weights = {(1, 1): (1 - a) * (1 - b), (2, 1): a * (1 - b), (1, 2): (1 - a) * b, (2, 2): a * b}
        return fold_left(add, (times(corner[key], weight) for key, weight in weights.items()))

    return price
