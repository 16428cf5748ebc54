"""An optimizer's moments of two factors, carried over to the factors of a lower rank that replace them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvNd, FactoredModule, PivotConv, PivotLinear, TensorizedLinear, weight_of

Convert = Callable[[list[Tensor]], list[Tensor]]


def factor_moments(old: nn.Module, new: nn.Module) -> tuple[Convert, Convert] | None:
    r"""Returns the conversions of first and second moments of the factors of ``old`` to those of ``new``.

    For :math:`W = U V` and new factors :math:`U A` and :math:`B V` the gradients of the new factors are those of the
    old ones times the matrices of the other side: :math:`\nabla (U A) = \nabla U \, B^T` and :math:`\nabla (B V) =
    A^T \nabla V`, at the same gradient of :math:`W`. A truncation is of this form, and first moments follow it exactly;
    :math:`A` and :math:`B` are found by least squares. Second moments follow with the squares of the matrices, as if
    the gradients of different inner channels were uncorrelated.

    Args:
        old: the layer that was.
        new: the one in its place.

    Returns:
        Functions of tensors in the order of the layers' two factors; ``None`` unless both layers are pairs of factors
        of one class and form, with an inner dimension that both factors share.
    """
    if type(old) is not type(new) or not isinstance(old, FactoredModule) or not isinstance(new, FactoredModule):
        return None
    if old.form != new.form or isinstance(old, (TensorizedLinear, PivotLinear, PivotConv)):
        return None
    sides = [_inner_last(layer) for layer in (old, new)]
    if sides[0] is None or sides[1] is None:
        return None
    if any(a.shape[:-1] != b.shape[:-1] for a, b in zip(*sides, strict=True)):
        return None
    maps = [torch.linalg.pinv(_matrix(a)) @ _matrix(b) for a, b in zip(*sides, strict=True)]
    dims = [_inner_dim(part, first=k == 0) for k, part in enumerate(old.parts)]

    def converter(power: int) -> Convert:
        def convert(tensors: list[Tensor]) -> list[Tensor]:
            found = []
            for tensor, dim, other in zip(tensors, dims, reversed(maps), strict=True):
                mixed = tensor.movedim(dim, -1).double() @ other.pow(power)
                found.append(mixed.movedim(-1, dim).to(tensor.dtype).contiguous())
            return found

        return convert

    return converter(1), converter(2)


def _inner_last(layer: FactoredModule) -> Sequence[Tensor] | None:
    """The two factors with their inner dimension last; ``None`` where there is no such pair."""
    parts = layer.parts
    if len(parts) != 2 or not all(isinstance(part, (nn.Linear, nn.Embedding, ConvNd)) for part in parts):
        return None
    if any(isinstance(part, ConvNd) and (part.transposed or part.groups > 1) for part in parts):
        return None
    return [weight_of(part).detach().movedim(_inner_dim(part, first=k == 0), -1) for k, part in enumerate(parts)]


def _inner_dim(part: nn.Module, *, first: bool) -> int:
    return 0 if first and not isinstance(part, nn.Embedding) else 1


def _matrix(factor: Tensor) -> Tensor:
    return factor.flatten(0, -2).double()
