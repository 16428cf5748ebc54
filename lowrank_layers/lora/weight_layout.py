"""How a delta ``s B A`` lies in a weight: of linear layers, embeddings, convolutions, and stacks of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..layers import ConvNd, FactoredModule, LowRankTransposedLinear, is_embedding
from ..layers.conv1d import is_conv1d_class


class WeightLayout(Protocol):
    """How ``A`` and ``B`` belong to one weight, and what its outputs are."""

    def shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``A`` and ``B``."""

    def limit(self, weight: Tensor) -> int:
        """The largest rank that a delta can have."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in the layout of the weight."""

    def directions(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of ``A`` and ``B`` with the rank first, ``[r, ...]`` each."""

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`directions`."""

    def pair(self, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` from factors ``[..., r, in]`` and ``[..., out, r]`` of :meth:`matrix`."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[..., out, in]``, which inits by singular values decompose."""

    def lengths(self, weight: Tensor) -> Tensor:
        """The norm of the entries that belong to each output, ``[..., out]``."""

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight with each output multiplied by its factor, ``[..., out]``."""


@dataclass(frozen=True)
class Matrix:
    """``[out, in]``, or ``[in, out]`` when transposed (embeddings, transformers' Conv1D); stacks of them likewise.

    ``A`` is ``[*, r, in]``, ``B`` ``[*, out, r]``.
    """

    transposed: bool = False

    def shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``A`` and ``B``."""
        *stack, out, into = self.matrix(weight).shape
        return (*stack, rank, into), (*stack, out, rank)

    def limit(self, weight: Tensor) -> int:
        """The smaller side."""
        return min(weight.shape[-2:])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in the layout of the weight."""
        return self.matrix(b @ a)

    def directions(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of ``A`` and ``B`` with the rank first."""
        return a.movedim(-2, 0), b.movedim(-1, 0)

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`directions`."""
        return a.movedim(0, -2), b.movedim(0, -1)

    def pair(self, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` from factors of the matrix: they are these."""
        shapes = self.shapes(weight, down.shape[-2])
        return down.reshape(shapes[0]), up.reshape(shapes[1])

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[..., out, in]``."""
        return weight.mT if self.transposed else weight

    def lengths(self, weight: Tensor) -> Tensor:
        """The norm of the entries that belong to each output."""
        norms: Tensor = torch.linalg.vector_norm(self.matrix(weight), dim=-1)
        return norms

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight with each output multiplied by its factor."""
        return weight * self.matrix(factor[..., None])


@dataclass(frozen=True)
class Kernel:
    """A convolution's ``[out, in / groups, *k]``, or ``[in, out / groups, *k]`` when transposed.

    ``A`` is ``[groups * r, in / groups, *k]``, the kernel of a convolution to ``r`` channels per group, ``B``
    ``[out, r, 1, ...]`` a pointwise one; for a transposed one ``A`` is ``[groups * r, in / groups]`` and ``B``
    ``[out, r, *k]``.
    """

    groups: int = 1
    transposed: bool = False

    def shapes(self, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``A`` and ``B``."""
        k = tuple(weight.shape[2:])
        ones = (1,) * len(k)
        if self.transposed:
            into, out = weight.shape[0] // self.groups, weight.shape[1] * self.groups
            return (self.groups * rank, into, *ones), (out, rank, *k)
        return (self.groups * rank, weight.shape[1], *k), (weight.shape[0], rank, *ones)

    def limit(self, weight: Tensor) -> int:
        """The smaller side of one group's matrix."""
        return min(self.matrix(weight).shape[-2:])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` in the layout of the weight, group by group."""
        g = self.groups
        a, b = a.unflatten(0, (g, -1)), b.unflatten(0, (g, -1))
        if self.transposed:
            return torch.einsum("gri,gor...->gio...", a.flatten(2), b).flatten(0, 1)
        return torch.einsum("gor,gri...->goi...", b.flatten(2), a).flatten(0, 1)

    def directions(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of ``A`` and ``B`` with the rank first; a direction has its part in every group."""
        return a.unflatten(0, (self.groups, -1)).transpose(0, 1), b.transpose(0, 1)

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`directions`."""
        return a.transpose(0, 1).flatten(0, 1), b.transpose(0, 1)

    def pair(self, weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` from factors of the matrix."""
        shapes = self.shapes(weight, down.shape[-2])
        if self.transposed:  # [..., out*area, r] holds the area behind r
            up = up.unflatten(-2, (-1, *weight.shape[2:])).movedim(-1, -1 - (weight.ndim - 2))
        return down.reshape(shapes[0]), up.reshape(shapes[1])

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[groups, out, in*area]`` (transposed: ``[groups, out*area, in]``)."""
        parts: Tensor = weight.unflatten(0, (self.groups, -1))
        return parts.flatten(2).mT if self.transposed else parts.flatten(2)

    def lengths(self, weight: Tensor) -> Tensor:
        """The norm of the entries that belong to each output."""
        norms: Tensor = torch.linalg.vector_norm(self._by_output(weight).flatten(1), dim=1)
        return norms

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight with each output multiplied by its factor."""
        return self._by_output(self._by_output(weight) * factor.view(-1, *[1] * (weight.ndim - 1)))

    def _by_output(self, weight: Tensor) -> Tensor:
        """Outputs first, and back again."""
        if not self.transposed:
            return weight
        turned: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return turned


SLICES = ("q_proj", "k_proj", "v_proj")
"""Names of the three slices of a fused ``in_proj_weight``, each of which can be adapted on its own."""


def dense_weight(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of that name, or the slice of a fused one; ``None`` for the product of a factored layer."""
    fused = parameter_of(module, "in_proj_weight")
    if name in SLICES and fused is not None:
        return fused.chunk(3)[SLICES.index(name)]
    return parameter_of(module, name)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of that name; of a replica of ``nn.DataParallel``, which has no parameters, the copy of it."""
    own = module._parameters.get(name)
    if own is None:
        copies: dict[str, Tensor] = module.__dict__.get("_former_parameters", {})
        return copies.get(name)
    return own


def layout_of(module: nn.Module, name: str) -> WeightLayout:
    """The layout of a module's parameter.

    Raises:
        UnsupportedLayerError: if it is no matrix, kernel or stack of matrices.
    """
    own = dense_weight(module, name)
    weight = getattr(module, name) if own is None else own
    groups = getattr(module, "groups", 1)
    if name == "weight" and isinstance(module, ConvNd):
        return Kernel(groups, module.transposed)
    if name == "weight" and isinstance(module, FactoredModule) and weight.ndim > 2:
        return Kernel(groups, bool(getattr(module, "transposed", False)))
    if name == "weight" and (is_lookup(module) or is_conv1d(module)):
        return Matrix(transposed=True)
    if weight.ndim in (2, 3):
        return Matrix()
    raise UnsupportedLayerError(
        f"add_lora_: {type(module).__name__}.{name} has shape {tuple(weight.shape)}, expected a matrix or a kernel."
    )


def is_lookup(module: nn.Module) -> bool:
    """Whether rows of its weight are looked up: an embedding or a bag, dense or factored."""
    return is_embedding(module) or ("Embedding" in type(module).__name__ and isinstance(module, FactoredModule))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, adapted or not, or our factored form of it."""
    return isinstance(module, LowRankTransposedLinear) or any(map(is_conv1d_class, type(module).__mro__))
