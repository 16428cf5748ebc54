"""The base class of inits of adapters, what an init is given for a weight, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decompose import svd
from ...errors import LowRankError
from ..adapted_weight import AdaptedWeight


@dataclass(frozen=True, eq=False)
class InitContext:
    """One weight that gets an adapter, as an init sees it.

    Args:
        weight: the weight: its ``name``, its ``values`` before this adapter, and whether it ``is_lookup``, as that of
            an embedding. Then ``down`` should start at zero in place of ``up``, so that rows which never occur stay.
        rank: rank of the adapter.
        scaling: what the product of the adapter's factors is multiplied by.
        generator: the random generator on the CPU to draw from; ``None`` is torch's global one.
    """

    weight: AdaptedWeight
    rank: int = 1
    scaling: float = 1.0
    generator: torch.Generator | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix ``[out, in]``, or as a stack ``[..., out, in]`` of them.

        A convolution has one matrix per group, whose columns are the input channels times the kernel's area.
        """
        return self.weight.layout.matrix(self.weight.values)

    @property
    def limit(self) -> int:
        """The largest rank of the matrix."""
        return self.weight.layout.limit(self.weight.base)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values in fp32 from the :attr:`generator`."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def single_matrix(self, init: str) -> Tensor:
        """:attr:`matrix` in fp32 at least, for inits that take its leading part off the base.

        Args:
            init: name of the init, for the message.

        Raises:
            LowRankError: for a stack of several matrices, or a scaling that is not positive.
        """
        matrix = self.matrix[0] if self.matrix.ndim == 3 and len(self.matrix) == 1 else self.matrix
        if matrix.ndim != 2 or not self.scaling > 0:
            raise LowRankError(
                f"add_lora_: init {init} needs one matrix and a positive scaling, and {self.weight.name!r} has shape"
                f" {tuple(self.matrix.shape)} and scaling {self.scaling:g}; use init='kaiming'."
            )
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    def in_layout(self, factors: LoRAFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of the adapter from factors of the matrix.

        Args:
            factors: what an init returned for this weight.
            dtype: dtype of the adapter.

        Raises:
            LowRankError: if they do not fit the matrix and the rank.
        """
        values, layout = self.weight.values, self.weight.layout
        *stack, rows, columns = layout.matrix(values).shape
        expected = (*stack, self.rank, columns), (*stack, rows, self.rank)
        found = []
        for factor, shape in zip((factors.down, factors.up), expected, strict=True):
            factor = torch.zeros(shape) if factor is None else factor
            if factor.shape != shape and (1, *factor.shape) != shape:
                raise LowRankError(
                    f"add_lora_: the init gave a factor of shape {tuple(factor.shape)} for {self.weight.name!r},"
                    f" expected {shape}: down is [..., rank, in], up is [..., out, rank]."
                )
            found.append(factor)
        a, b = (side.to(values.device, dtype).contiguous() for side in layout.pair(values, *found))
        return a, b


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """The factors with which an adapter starts: ``scaling * up @ down`` is added to the matrix of the weight.

    Args:
        down: ``[..., rank, in]``; ``None`` for zeros.
        up: ``[..., out, rank]``; ``None`` for zeros.
        subtract: whether the product is taken off again by a frozen copy, so that the model starts where the base is.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    subtract: bool = False


class LoRAInit(ABC):
    """How adapters start: an init of your own derives from this, overrides :meth:`factors` and is given as ``init=``.

    Examples:
        >>> class Ones(lr.LoRAInit):
        ...     def factors(self, context):
        ...         return lr.LoRAFactors(down=torch.ones(context.rank, context.matrix.shape[-1]))
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(3, 4)), rank=2, init=Ones())
        >>> model[0].lora_weight.adapters["default"].A.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    @abstractmethod
    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter.

        Args:
            context: the weight, the rank and what else an init may look at.
        """

    def limit(self, context: InitContext) -> int:
        """The largest rank that this init can give a weight; by default that of its matrix."""
        return context.limit

    def singular_values(self, context: InitContext) -> Tensor:
        """What a rank rule reads, in descending order; by default the singular values of the weight's matrix."""
        return singular_values(context.matrix)

    def ranks(self, contexts: Sequence[InitContext], rank: int) -> list[int]:
        """Returns the rank of each weight; by default each gets ``rank``.

        Args:
            contexts: the weights that get adapters, in order.
            rank: the rank asked for.
        """
        return [rank] * len(contexts)


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of a matrix in fp64; of a stack of matrices, the root mean squares over the stack."""
    values = torch.linalg.svdvals(matrix.double()).reshape(-1, min(matrix.shape[-2:]))
    mean: Tensor = values.square().mean(0).sqrt()
    return mean


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``U [..., out, r]``, ``S [..., r]`` and ``Vh [..., r, in]`` of a matrix or of a stack of them."""
    parts = [svd(each, rank) for each in matrix.reshape(-1, *matrix.shape[-2:])]
    u, s, vh = (torch.stack(sides) for sides in zip(*((part.u, part.s, part.vh) for part in parts), strict=True))
    return (u, s, vh) if matrix.ndim == 3 else (u[0], s[0], vh[0])


def check_fits(tensor: Tensor | None, context: InitContext, init: str, remedy: str) -> Tensor:
    """The tensor that belongs to a weight, on its device and in fp32 at least.

    Args:
        tensor: the tensor, or ``None`` where there is none.
        context: the weight.
        init: name of the init, for the message.
        remedy: what to give the init, for the message.

    Raises:
        LowRankError: if there is none, or it has another shape than the weight.
    """
    weight = context.weight.values
    if tensor is None or tensor.shape != weight.shape:
        got = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise LowRankError(
            f"add_lora_: init {init} got {got} for {context.weight.name!r}, expected a tensor of shape"
            f" {tuple(weight.shape)}; give {remedy}."
        )
    return tensor.to(weight.device, torch.promote_types(tensor.dtype, torch.float32))
