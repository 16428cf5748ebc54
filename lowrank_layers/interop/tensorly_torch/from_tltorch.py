"""Layers of tensorly-torch to this library's, with equal outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decompose import svd
from ...decompose.ranks import cp_limit
from ...decompose.tucker_ranks import tucker_limits
from ...errors import LowRankError, UnsupportedLayerError
from ...layers import FactoredModule, LowRankEmbedding, LowRankLinear, TensorizedEmbedding, bias_of, weight_of
from ...layers.conversion import fill
from ...layers.kernel import CONVS, kernel_of
from ...linalg import mode_product
from .library import CP_CONVS, TUCKER_CONVS, import_tltorch


def from_tltorch(module: nn.Module) -> FactoredModule:
    """Converts a layer of tensorly-torch to the layer that computes the same; no memory is shared.

    A ``FactorizedConv`` in CP or Tucker form keeps its factors (in Tucker form those of the spatial axes are multiplied
    into the core), a ``FactorizedEmbedding`` in block TT form its cores, a ``FactorizedLinear`` in CP form with one
    mode per side its two factors. Any other ``FactorizedLinear`` or ``FactorizedEmbedding`` becomes a pair of the exact
    rank of its dense matrix, which may be larger than its factors were. Ranks above the largest of use are reduced.

    Args:
        module: a ``FactorizedConv``, ``FactorizedLinear`` or ``FactorizedEmbedding``.

    Raises:
        UnsupportedLayerError: for other modules (``TRL`` and ``TCL`` among them), weights that several layers share,
            tensor dropout and lasso, complex factors, and convolutions in other forms.
        MissingExtraError: if tensorly-torch is not installed.

    Examples:
        >>> import tltorch
        >>> from lowrank_layers.interop import from_tltorch
        >>> theirs = tltorch.FactorizedEmbedding(64, 27, rank=4)
        >>> ours, x = from_tltorch(theirs), torch.arange(64)
        >>> type(ours).__name__, ours.rank, torch.allclose(ours(x), theirs(x), atol=1e-6)
        ('TensorizedEmbedding', (4, 4), True)
    """
    tltorch = import_tltorch()
    makers = {
        tltorch.FactorizedConv: _from_conv,
        tltorch.FactorizedLinear: _from_linear,
        tltorch.FactorizedEmbedding: _from_embedding,
    }
    make = makers.get(type(module))
    if make is None:
        raise UnsupportedLayerError(
            f"from_tltorch: got {type(module).__name__}, expected a FactorizedConv, FactorizedLinear or"
            " FactorizedEmbedding of tensorly-torch; regression and contraction layers correspond to no layer of torch."
        )
    theirs: Any = module
    if theirs.n_layers != 1:
        raise UnsupportedLayerError(
            f"from_tltorch: got a {type(module).__name__} with n_layers={theirs.n_layers}, expected one layer: a weight"
            " that several layers share cannot be cut up without copying it."
        )
    if theirs.weight._forward_hooks:
        raise UnsupportedLayerError(
            f"from_tltorch: got a {type(module).__name__} with tensor dropout or lasso, expected none; remove it with"
            " tltorch.remove_tensor_dropout or remove_tensor_lasso."
        )
    if any(parameter.is_complex() for parameter in theirs.parameters()):
        raise UnsupportedLayerError(f"from_tltorch: got a {type(module).__name__} with complex factors, expected real.")
    with torch.no_grad():
        return make(tltorch, theirs)


def _from_conv(tltorch: Any, theirs: Any) -> FactoredModule:
    """Converts a ``FactorizedConv``."""
    weight = theirs.weight
    dense = _blank(
        CONVS.get(theirs.order, nn.Conv3d),
        theirs,
        theirs.in_channels,
        theirs.out_channels,
        tuple(theirs.kernel_size),
        *(tuple(int(n) for n in setting) for setting in (theirs.stride, theirs.padding, theirs.dilation)),
        bias=theirs.bias is not None,
    )
    shape = tuple(kernel_of(dense).shape[1:])
    if isinstance(weight, tltorch.CPTensor) and theirs.order in CP_CONVS:
        cp = CP_CONVS[theirs.order]
        if weight.rank > cp_limit(shape):
            weight_of(dense).copy_(weight.to_tensor())
            return cp.from_dense(dense, rank=cp_limit(shape))
        first, *others = weight.factors
        return cp.from_matrices(dense, [(first * weight.weights)[None], *(f[None] for f in others)], bias_of(dense))
    if isinstance(weight, tltorch.TuckerTensor) and theirs.order in TUCKER_CONVS:
        tucker, limits = TUCKER_CONVS[theirs.order], tucker_limits(shape)
        expand, reduce, *axes = weight.factors
        core = weight.core
        if core.shape[0] > limits[0] or core.shape[1] > limits[1]:
            weight_of(dense).copy_(weight.to_tensor())
            return tucker.from_dense(dense, rank=limits)
        for k, axis in enumerate(axes):
            core = mode_product(core, axis, 2 + k)
        return tucker.from_chain(dense, reduce.mT[None], core[None], expand[None], bias_of(dense))
    raise UnsupportedLayerError(
        f"from_tltorch: got a FactorizedConv of order {theirs.order} in the form {weight.name}, expected CP or Tucker"
        " of order 1 to 3; put its weight into a torch convolution and factorize that."
    )


def _from_linear(tltorch: Any, theirs: Any) -> FactoredModule:
    """Converts a ``FactorizedLinear``."""
    into, out = int(theirs.in_features), int(theirs.out_features)
    dense = _blank(nn.Linear, theirs, into, out, bias=theirs.bias is not None)
    up, down = _pair(tltorch, theirs)
    return fill(LowRankLinear.like(dense, rank=len(down)), [down, up], bias_of(dense))


def _from_embedding(tltorch: Any, theirs: Any) -> FactoredModule:
    """Converts a ``FactorizedEmbedding``."""
    rows, columns = int(theirs.num_embeddings), int(theirs.embedding_dim)
    dense = _blank(nn.Embedding, theirs, rows, columns)
    assert isinstance(dense, nn.Embedding)
    if not isinstance(theirs.weight, tltorch.BlockTT):
        down, up = _pair(tltorch, theirs)
        return LowRankEmbedding.from_pair(dense, down[:rows], up.mT)
    cores: Sequence[Tensor] = list(theirs.weight.factors)
    if len(cores) == 2 and cores[0].shape[2] == 1 and cores[1].shape[1] == 1:
        down, up = cores[0][0, :rows, 0], cores[1][:, 0, :, 0]
        if down.shape[1] <= min(rows, columns):
            return LowRankEmbedding.from_pair(dense, down, up.mT)
    if len(cores) == 1:  # a dense matrix; our trains have at least two cores
        cores = [*cores, cores[0].new_ones(1, 1, 1, 1)]
    return TensorizedEmbedding.from_cores(dense, cores)


def _pair(tltorch: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Returns factors ``[m, r]`` and ``[r, n]`` of the matrix: its own two, or a pair of its exact rank."""
    weight = theirs.weight
    if isinstance(weight, tltorch.CPTensorized) and len(weight.factors) == 2:
        left, right = weight.factors
        if left.shape[1] <= min(len(left), len(right)):
            return left * weight.weights, right.mT
    matrix = weight.to_matrix().reshape(*map(int, theirs.weight_shape))  # the dense form has one axis per digit
    found = svd(matrix.double(), method="exact")
    noise = max(matrix.shape) * torch.finfo(matrix.dtype).eps * found.s[0]
    left, right = found.truncate(max(1, int((found.s > noise).sum()))).pair()
    return left, right


def _blank(kind: type[nn.Module], theirs: Any, *settings: Any, **more: Any) -> nn.Module:
    """Builds a torch layer with the dtype, device, bias, mode and gradient flags of ``theirs``.

    Args:
        kind: class of the layer.
        theirs: the layer of tensorly-torch.
        *settings: positional arguments of the constructor.
        **more: keyword arguments of the constructor.
    """
    parameters = list(theirs.weight.parameters()) or list(theirs.weight.buffers())
    if not parameters:
        raise LowRankError(f"from_tltorch: got a {type(theirs).__name__} without factors.")
    first = parameters[0]
    dense: nn.Module = nn.utils.skip_init(kind, *settings, **more, device=first.device, dtype=first.dtype)
    dense.train(theirs.training)
    weight_of(dense).requires_grad_(any(parameter.requires_grad for parameter in parameters))
    bias = bias_of(dense)
    if bias is not None:
        bias.copy_(theirs.bias)
        bias.requires_grad_(theirs.bias.requires_grad)
    return dense
