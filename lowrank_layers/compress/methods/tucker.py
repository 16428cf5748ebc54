"""Tucker-2 for convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...decompose.tucker_ranks import choose_tucker_rank, tucker_limits
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
from ...linalg import Root, exact_svd, leading_eigenvectors, mode_product, unfold
from ..candidates import Candidate
from ..method import Option, factored_cost, factored_costs, layer_for, spread
from ..regression import FirstStage, joint_bias


@dataclass(frozen=True)
class TuckerMethod:
    """Replaces a convolution by three, which reduce the channels, convolve, and expand the channels (Kim et al., 2016).

    The reduction is the leading input subspace of the kernel, weighted by channel moments and curvature; given that,
    core and expansion are the optimum of the weighted regression. With statistics transposed convolutions are left to
    other methods: the patches that they make overlap, and a subspace of patches is no subspace of channels.

    Args:
        steps: number of input ranks considered.
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

    def matches(self, layer: Candidate) -> bool:
        """Returns whether the method can factorize this layer; a 1 x 1 kernel has nothing between the channel modes."""
        return layer_for(self, layer.module) is not None and kernel_area(layer.module) > 1

    def options(self, layer: Candidate) -> list[Option]:
        """Returns all output ranks at a handful of input ranks at which the layer is smaller than the dense one."""
        if is_transposed(layer.module) and layer.stats is not None:
            return []
        top_out, top_in = tucker_limits(kernel_of(layer.module).shape[1:])
        if factored_cost(self, layer, (1, 1)).params >= layer.before.params:
            return []
        inputs = spread(top_in, self.steps, layer.round_to)
        found = {
            (r_out, r_in): max(loss, 0.0)
            for r_in, losses in zip(inputs, _losses(layer, inputs), strict=True)
            for r_out, loss in zip(range(1, top_out + 1), losses, strict=False)
        }
        options = map(Option, found, factored_costs(self, layer, list(found)), found.values())
        return [option for option in options if option.cost.params < layer.before.params]

    def choose(self, layer: Candidate, rank: Any) -> tuple[int, int]:
        """Returns the ranks that integers or rules mean; rules see the weighted kernel."""
        known = replace(layer, stats=None) if is_transposed(layer.module) else layer
        kernels = torch.stack([kernel for kernel, _ in known.weighted_kernels])
        cls = layer_for(self, layer.module)
        assert cls is not None
        return choose_tucker_rank(rank, tuple(kernels[0].shape), kernels, cls.__name__)

    def build(self, layer: Candidate, rank: Any) -> FactoredModule:
        """Returns the factored layer; with statistics the one that minimises the weighted error."""
        module = layer.module
        cls = layer_for(self, module)
        assert cls is not None
        assert issubclass(cls, TuckerConv)
        if layer.stats is None or is_transposed(module):
            return cls.from_dense(module, rank=rank)
        shape = tuple(kernel_of(module).shape[1:])
        r_out, r_in = choose_tucker_rank(rank, shape, None, cls.__name__)
        problems = layer.kernel_problems
        reduces = [_input_basis(kernel, root, r_out)[:, :r_in] for kernel, root in layer.weighted_kernels]
        stages = [FirstStage(reduce.mT, kernel_area(module)) for reduce in reduces]
        pairs = [problem.after(stage).pair(r_out) for problem, stage in zip(problems, stages, strict=True)]
        products = [expand @ core @ stage.dense() for (expand, core), stage in zip(pairs, stages, strict=True)]
        expands, cores = (torch.stack(side) for side in zip(*pairs, strict=True))
        core = cores.unflatten(2, (r_in, *shape[2:]))
        return cls.from_chain(module, torch.stack(reduces).mT, core, expands, joint_bias(problems, products))


def _input_basis(kernel: Tensor, root: Root, r_out: int | None = None) -> Tensor:
    """Directions of the input channels, the most useful first, ``[in, in]``: ``z = basis^T x``.

    With ``r_out`` only what the leading output directions use counts (one step of HOOI).

    Args:
        kernel: one group's kernel, weighted on both channel modes.
        root: root of the input channels' moment.
        r_out: number of output directions.
    """
    if r_out is not None:
        u = exact_svd(unfold(kernel, 0))[0][:, :r_out]
        kernel = mode_product(kernel, u.mT, 0)
    matrix = unfold(kernel, 1)
    return root.divide(leading_eigenvectors(matrix @ matrix.mT, len(matrix)))


def _losses(layer: Candidate, inputs: list[int]) -> Iterator[list[float]]:
    """Loss increase at output rank 1, 2, ... for each input rank."""
    if layer.stats is None:
        yield from _plain_losses(kernel_of(layer.module).detach().double().flatten(3), inputs)
        return
    area = kernel_area(layer.module)
    bases = [_input_basis(*weighted) for weighted in layer.weighted_kernels]
    for r_in in inputs:
        total: list[Tensor] = []
        for problem, basis in zip(layer.kernel_problems, bases, strict=True):
            left = problem.after(FirstStage(basis[:, :r_in].mT, area))
            total.append(problem.energy - 0.5 * problem.scale * left.singular_values.square().cumsum(0).cpu())
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
