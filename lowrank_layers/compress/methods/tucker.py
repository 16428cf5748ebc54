"""Tucker-2 for convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce as fold_left
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
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
from ...layers.tucker_conv import choose_tucker_rank, tucker_limits
from ...linalg import exact_svd, leading_eigenvectors, mode_product, unfold
from .base import Option, factored_cost, layer_for, repeated_cost
from .regression import Front, Regression, joint_bias
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
        inputs = sorted({max(1, round(top_in * k / self.steps)) for k in range(1, self.steps + 1)})
        options = []
        for r_in, losses in zip(inputs, _losses(module, stats, inputs), strict=True):
            for r_out in range(1, min(top_out, len(losses)) + 1):
                options.append(Option((r_out, r_in), price(r_out, r_in), max(losses[r_out - 1], 0.0)))
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
        fronts = [Front(reduce.mT, kernel_area(module)) for reduce in reduces]
        pairs = [problem.after(front).pair(r_out) for problem, front in zip(problems, fronts, strict=True)]
        products = [expand @ core @ front.dense() for (expand, core), front in zip(pairs, fronts, strict=True)]
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


def _losses(conv: nn.Module, stats: LayerStats | None, inputs: list[int]) -> Iterator[list[float]]:
    """Loss increase at output rank 1, 2, ... for each input rank."""
    if stats is None:
        yield from _plain_losses(kernel_of(conv).detach().double().flatten(3), inputs)
        return
    problems = kernel_problems(conv, stats)
    bases = [_input_basis(conv, problem) for problem in problems]
    for r_in in inputs:
        total: list[Tensor] = []
        for problem, basis in zip(problems, bases, strict=True):
            left = problem.after(Front(basis[:, :r_in].mT, kernel_area(conv)))
            total.append(problem.energy - 0.5 * problem.scale * left.singular_values().square().cumsum(0).cpu())
        yield torch.stack(total).sum(0).tolist()


def _plain_losses(kernels: Tensor, inputs: list[int]) -> Iterator[list[float]]:
    """The same without weights, where all is orthonormal: the energy outside the leading subspaces (HOSVD).

    Shape:
        ``[groups, out, in, area]``.
    """
    rows = kernels.transpose(1, 2).flatten(2)
    basis = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(-1)
    turned = (basis.mT @ rows).unflatten(2, (kernels.shape[1], -1))  # [groups, in, out, area]
    gram = kernels.new_zeros(len(kernels), kernels.shape[1], kernels.shape[1])
    done = 0
    for r_in in inputs:
        new = turned[:, done:r_in].transpose(1, 2).flatten(2)
        gram += new @ new.mT
        done = r_in
        captured = torch.linalg.eigvalsh(gram).flip(-1).cumsum(-1).sum(0)
        yield (0.5 * (kernels.square().sum() - captured)).tolist()


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
