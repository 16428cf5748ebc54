"""tensorly-torch's layers and ours, both ways, with equal outputs. Needs tensorly-torch, the extra ``tensorly``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import svd
from ..decompose.ranks import cp_limit
from ..decompose.tucker_ranks import tucker_limits
from ..errors import LowRankError, MissingExtraError, UnsupportedLayerError
from ..layers import (
    CPConv,
    CPConv1d,
    CPConv2d,
    CPConv3d,
    FactoredModule,
    LowRankEmbedding,
    LowRankLinear,
    TensorizedEmbedding,
    TuckerConv,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    bias_of,
    weight_of,
)
from ..layers.conversion import fill
from ..layers.kernel import CONVS, kernel_of
from ..linalg import mode_product

_CP: dict[int, type[CPConv]] = {1: CPConv1d, 2: CPConv2d, 3: CPConv3d}
_TUCKER: dict[int, type[TuckerConv]] = {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}


def to_tltorch(layer: FactoredModule) -> nn.Module:
    """The layer of tensorly-torch that computes the same; nothing is shared with the source.

    ``CPConv`` and ``TuckerConv`` become a ``FactorizedConv`` (Tucker: with identity factors on the kernel's own axes),
    ``LowRankLinear`` a ``FactorizedLinear`` in CP form over one mode a side, ``LowRankEmbedding`` and
    ``TensorizedEmbedding`` a ``FactorizedEmbedding`` in block TT form. tensorly-torch has no ``padding_idx``: it is
    dropped where the vector is zero in the factors themselves (in a ``LowRankEmbedding``), and from then on learns
    like any other. Digits of a ``TensorizedEmbedding`` that count beyond its rows do so there too.

    Args:
        layer: one of ours.

    Returns:
        The ``tltorch`` layer, implementation ``"factorized"``.

    Raises:
        UnsupportedLayerError: for what tensorly-torch cannot express: groups, transposed convolutions, ``"same"``
            padding, padding modes, other layers, a padding vector that only a mask makes zero, ``max_norm``,
            ``scale_grad_by_freq``, ``sparse``.
        MissingExtraError: without tensorly-torch.

    Examples:
        >>> from lowrank_layers.interop import from_tltorch, to_tltorch
        >>> layer = lr.CPConv2d(8, 16, 3, padding=1, rank=4)
        >>> theirs, x = to_tltorch(layer), torch.randn(2, 8, 6, 6)
        >>> torch.allclose(theirs(x), layer(x), atol=1e-5)
        True
        >>> from_tltorch(theirs).rank
        4
    """
    tltorch = _tltorch()
    if type(layer) in (*_CP.values(), *_TUCKER.values()):
        assert isinstance(layer, (CPConv, TuckerConv))
        theirs = _to_conv(tltorch, layer)
    elif type(layer) is LowRankLinear:
        theirs = _to_linear(tltorch, layer)
    elif type(layer) is LowRankEmbedding or type(layer) is TensorizedEmbedding:
        theirs = _to_embedding(tltorch, layer)
    else:
        raise UnsupportedLayerError(
            f"to_tltorch: got {type(layer).__name__}, expected a CPConv, TuckerConv (not transposed), LowRankLinear,"
            " LowRankEmbedding or TensorizedEmbedding; tensorly-torch has nothing like it. to_dense() gives torch's."
        )
    learns = any(weight_of(child).requires_grad for child in layer.children())
    for parameter in theirs.weight.parameters():
        parameter.requires_grad_(learns)
    bias = bias_of(layer.last)
    if bias is not None:
        theirs.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    converted: nn.Module = theirs.train(layer.training)
    return converted


def from_tltorch(module: nn.Module) -> FactoredModule:
    """Our layer that computes the same as one of tensorly-torch; nothing is shared with the source.

    A ``FactorizedConv`` in CP or Tucker form keeps its factors (Tucker: those of the kernel's own axes are multiplied
    into the core), a ``FactorizedEmbedding`` in block TT form its cores, a ``FactorizedLinear`` in CP form over one
    mode a side its pair. Any other ``FactorizedLinear`` and ``FactorizedEmbedding`` becomes a pair of the exact rank of
    its dense matrix, which may be larger than the factors were. Ranks above the largest of use are reduced to it.

    Args:
        module: a ``FactorizedConv``, ``FactorizedLinear`` or ``FactorizedEmbedding``.

    Raises:
        UnsupportedLayerError: for other modules (``TRL`` and ``TCL`` among them), one weight for several layers,
            tensor dropout and lasso, complex factors, convolutions in other forms.
        MissingExtraError: without tensorly-torch.

    Examples:
        >>> import tltorch
        >>> from lowrank_layers.interop import from_tltorch
        >>> theirs = tltorch.FactorizedEmbedding(64, 27, rank=4)
        >>> ours, x = from_tltorch(theirs), torch.arange(64)
        >>> type(ours).__name__, ours.rank, torch.allclose(ours(x), theirs(x), atol=1e-6)
        ('TensorizedEmbedding', (4, 4), True)
    """
    tltorch = _tltorch()
    makers = {
        tltorch.FactorizedConv: _from_conv,
        tltorch.FactorizedLinear: _from_linear,
        tltorch.FactorizedEmbedding: _from_embedding,
    }
    make = makers.get(type(module))
    if make is None:
        raise UnsupportedLayerError(
            f"from_tltorch: got {type(module).__name__}, expected a FactorizedConv, FactorizedLinear or"
            " FactorizedEmbedding of tensorly-torch; regression and contraction layers stand for no torch layer."
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


def _tltorch() -> Any:
    try:
        import tltorch
    except ImportError:
        raise MissingExtraError(
            "converting tensorly-torch's layers needs tensorly-torch; install lowrank-layers[tensorly]."
        ) from None
    return tltorch


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def _refuse(setting: str, remedy: str) -> None:
    raise UnsupportedLayerError(f"to_tltorch: got {setting}, which tensorly-torch cannot express; {remedy}.")


# ------------------------------------------------------------------------------------------------- convolutions


def _to_conv(tltorch: Any, layer: CPConv | TuckerConv) -> Any:
    if layer.groups != 1:
        _refuse(f"groups={layer.groups}", "convert the dense layer of each group")
    if layer.padding_mode != "zeros":
        _refuse(f"padding_mode={layer.padding_mode!r}", "pad the input with torch.nn.functional.pad")
    if layer.padding == "same":
        _refuse("padding='same'", "give the padding in numbers")
    if isinstance(layer, CPConv):
        out, into, *axes = (_parameter(matrix[0]) for matrix in layer._matrices())
        weight = tltorch.CPTensor(_parameter(torch.ones_like(out[0])), [out, into, *axes])
    else:
        reduce, core, expand = (matrix[0] for matrix in layer._matrices())
        axes = [_parameter(torch.eye(k, dtype=core.dtype, device=core.device)) for k in layer.kernel_size]
        weight = tltorch.TuckerTensor(_parameter(core), [_parameter(expand), _parameter(reduce.mT), *axes])
    return tltorch.FactorizedConv(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=0 if layer.padding == "valid" else layer.padding,
        dilation=layer.dilation,
        bias=bias_of(layer.last) is not None,
        factorization=weight,
    )


def _from_conv(tltorch: Any, theirs: Any) -> FactoredModule:
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
    if isinstance(weight, tltorch.CPTensor) and theirs.order in _CP:
        cp = _CP[theirs.order]
        if weight.rank > cp_limit(shape):
            weight_of(dense).copy_(weight.to_tensor())
            return cp.from_dense(dense, rank=cp_limit(shape))
        first, *others = weight.factors
        return cp.from_matrices(dense, [(first * weight.weights)[None], *(f[None] for f in others)], bias_of(dense))
    if isinstance(weight, tltorch.TuckerTensor) and theirs.order in _TUCKER:
        tucker, limits = _TUCKER[theirs.order], tucker_limits(shape)
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


# --------------------------------------------------------------------------------------------------- matrices


def _to_linear(tltorch: Any, layer: LowRankLinear) -> Any:
    up, down = _parameter(layer.up.weight), _parameter(layer.down.weight.mT)
    shape = (layer.out_features,), (layer.in_features,)
    weight = tltorch.CPTensorized(_parameter(torch.ones_like(up[0])), [up, down], shape, rank=layer.rank)
    return tltorch.FactorizedLinear(
        shape[1], shape[0], bias=bias_of(layer.last) is not None, factorization=weight, implementation="factorized"
    )


def _from_linear(tltorch: Any, theirs: Any) -> FactoredModule:
    into, out = int(theirs.in_features), int(theirs.out_features)
    dense = _blank(nn.Linear, theirs, into, out, bias=theirs.bias is not None)
    up, down = _pair(tltorch, theirs)
    return fill(LowRankLinear.like(dense, rank=len(down)), [down, up], bias_of(dense))


def _pair(tltorch: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """``[m, r]`` and ``[r, n]`` whose product is the matrix: its own two factors, else what its exact rank asks for."""
    weight = theirs.weight
    if isinstance(weight, tltorch.CPTensorized) and len(weight.factors) == 2:
        left, right = weight.factors
        if left.shape[1] <= min(len(left), len(right)):
            return left * weight.weights, right.mT
    matrix = weight.to_matrix().reshape(*map(int, theirs.weight_shape))  # the dense form leaves it in digits
    found = svd(matrix.double(), method="exact")
    noise = max(matrix.shape) * torch.finfo(matrix.dtype).eps * found.s[0]
    left, right = found.truncate(max(1, int((found.s > noise).sum()))).pair()
    return left, right


# ----------------------------------------------------------------------------------------------------- tables


def _to_embedding(tltorch: Any, layer: LowRankEmbedding | TensorizedEmbedding) -> Any:
    down = layer.down if isinstance(layer, LowRankEmbedding) else None
    if down is not None:
        assert isinstance(layer, LowRankEmbedding)
        if layer.max_norm is not None:
            _refuse(f"max_norm={layer.max_norm}", "renormalize the table once and drop it")
        for setting in ("scale_grad_by_freq", "sparse"):
            if getattr(down, setting):
                _refuse(f"{setting}=True", "drop it")
        cores = [down.weight[None, :, None], layer.up.weight.mT[:, None, :, None]]
    else:
        assert isinstance(layer, TensorizedEmbedding)
        cores = layer.cores()
        if layer.padding_idx is not None and not _is_zero(layer):
            _refuse(
                f"padding_idx={layer.padding_idx} where the cores are not zero and only a mask makes the vector so",
                "build the layer without padding_idx",
            )
    rows, columns = (tuple(core.shape[axis] for core in cores) for axis in (1, 2))
    bonds = (*(core.shape[0] for core in cores), 1)
    theirs = tltorch.FactorizedEmbedding(
        int(torch.Size(rows).numel()),
        layer.embedding_dim,
        auto_tensorize=False,
        tensorized_num_embeddings=rows,
        tensorized_embedding_dim=columns,
        factorization="blocktt",
        rank=1,
        dtype=cores[0].dtype,
    )
    theirs.weight = tltorch.BlockTT([_parameter(core) for core in cores], (rows, columns), bonds)
    theirs.rank = bonds
    theirs.num_embeddings = layer.num_embeddings
    return theirs


def _is_zero(layer: TensorizedEmbedding) -> bool:
    vector = layer.factors().to_dense()[layer.padding_idx]
    return not bool(vector.any())


def _from_embedding(tltorch: Any, theirs: Any) -> FactoredModule:
    rows, columns = int(theirs.num_embeddings), int(theirs.embedding_dim)
    dense = _blank(nn.Embedding, theirs, rows, columns)
    assert isinstance(dense, nn.Embedding)
    if not isinstance(theirs.weight, tltorch.BlockTT):
        thin, project = _pair(tltorch, theirs)
        return LowRankEmbedding.from_pair(dense, thin[:rows], project.mT)
    cores: Sequence[Tensor] = list(theirs.weight.factors)
    if len(cores) == 2 and cores[0].shape[2] == 1 and cores[1].shape[1] == 1:
        thin, project = cores[0][0, :rows, 0], cores[1][:, 0, :, 0]
        if thin.shape[1] <= min(rows, columns):
            return LowRankEmbedding.from_pair(dense, thin, project.mT)
    if len(cores) == 1:  # a dense table; a train of ours has two cores at least
        cores = [*cores, cores[0].new_ones(1, 1, 1, 1)]
    return TensorizedEmbedding.from_cores(dense, cores)


def _blank(kind: type[nn.Module], theirs: Any, *settings: Any, **more: Any) -> nn.Module:
    """The torch layer with those settings and the dtype, device, bias, mode and gradient flags of ``theirs``."""
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
