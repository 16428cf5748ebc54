"""Dense layers as linear maps: their weight as a stack of matrices, one per group."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..linalg import check_tensor
from .kernel import ConvNd, kernel_of, kernel_of_matrix, linear_axes, matrix_of, weight_of_kernel
from .transposed_linear import LowRankTransposedLinear
from .weights import weight_of


def is_embedding(module: nn.Module) -> bool:
    """Returns whether a layer looks up rows of its weight.

    Its inputs are one-hot, so their second moments are diagonal and are not centred.
    """
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def is_transposed(module: nn.Module) -> bool:
    """Returns whether a layer is a transposed convolution, whose output patches overlap and are summed."""
    return isinstance(module, ConvNd) and module.transposed


def takes_bias(module: nn.Module) -> bool:
    """Returns whether a bias can correct the mean output of the layer's matrix."""
    return not is_embedding(module) and not is_transposed(module)


def matrices_of(module: nn.Module) -> Tensor:
    """Returns the weight of a dense layer as ``[groups, out, in]``.

    The weight of an embedding is transposed, the kernel of a convolution flattened. A convolution is a linear map of
    patches of its input, a transposed one a map to patches of its output.
    """
    weight = check_tensor(weight_of(module), type(module).__name__)
    if isinstance(module, ConvNd):
        return matrix_of(kernel_of(module).detach(), linear_axes(module))
    return (weight.mT if is_embedding(module) or LowRankTransposedLinear.stands_for(module) else weight)[None]


def weight_from_matrices(module: nn.Module, matrices: Tensor) -> Tensor:
    """Inverse of :func:`matrices_of`: the weight in the layout of ``module``."""
    if isinstance(module, ConvNd):
        kernel = kernel_of_matrix(matrices, kernel_of(module).shape, linear_axes(module))
        return weight_of_kernel(kernel, transposed=module.transposed)
    matrix = matrices[0]
    return matrix.mT if is_embedding(module) or LowRankTransposedLinear.stands_for(module) else matrix


def linear_shape(module: nn.Module) -> tuple[int, int, int]:
    """Returns the shape ``(groups, out, in)`` of :func:`matrices_of`, without reading the weight."""
    if isinstance(module, ConvNd):
        groups, out, into, *k = kernel_of(module).shape
        area = math.prod(k)
        return (groups, out * area, into) if module.transposed else (groups, out, into * area)
    rows, columns = weight_of(module).shape
    swapped = is_embedding(module) or LowRankTransposedLinear.stands_for(module)
    return (1, columns, rows) if swapped else (1, rows, columns)
