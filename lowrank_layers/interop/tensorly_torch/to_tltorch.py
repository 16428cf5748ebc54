"""Layers of this library to tensorly-torch's, with equal outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedLayerError
from ...layers import (
    CPConv,
    FactoredModule,
    LowRankEmbedding,
    LowRankLinear,
    TensorizedEmbedding,
    TuckerConv,
    bias_of,
    weight_of,
)
from .library import CP_CONVS, TUCKER_CONVS, import_tltorch


def to_tltorch(layer: FactoredModule) -> nn.Module:
    """Converts a layer to the layer of tensorly-torch that computes the same; no memory is shared.

    ``CPConv`` and ``TuckerConv`` become a ``FactorizedConv`` (in Tucker form with identity factors on the spatial
    axes), ``LowRankLinear`` a ``FactorizedLinear`` in CP form with one mode per side, ``LowRankEmbedding`` and
    ``TensorizedEmbedding`` a ``FactorizedEmbedding`` in block TT form. tensorly-torch has no ``padding_idx``: it is
    dropped where the vector is zero in the factors (in a ``LowRankEmbedding``), and the vector learns like any other
    from then on. Digits of a ``TensorizedEmbedding`` that count beyond its rows are kept.

    Args:
        layer: a layer of this library.

    Returns:
        The layer of ``tltorch``, with implementation ``"factorized"``.

    Raises:
        UnsupportedLayerError: for layers and settings that tensorly-torch does not have: groups, transposed
            convolutions, ``"same"`` padding, padding modes, padding vectors that only a mask makes zero,
            ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.
        MissingExtraError: if tensorly-torch is not installed.

    Examples:
        >>> from lowrank_layers.interop import from_tltorch, to_tltorch
        >>> layer = lr.CPConv2d(8, 16, 3, padding=1, rank=4)
        >>> theirs, x = to_tltorch(layer), torch.randn(2, 8, 6, 6)
        >>> torch.allclose(theirs(x), layer(x), atol=1e-5)
        True
        >>> from_tltorch(theirs).rank
        4
    """
    tltorch = import_tltorch()
    if type(layer) in (*CP_CONVS.values(), *TUCKER_CONVS.values()):
        assert isinstance(layer, (CPConv, TuckerConv))
        theirs = _to_conv(tltorch, layer)
    elif type(layer) is LowRankLinear:
        theirs = _to_linear(tltorch, layer)
    elif type(layer) is LowRankEmbedding or type(layer) is TensorizedEmbedding:
        theirs = _to_embedding(tltorch, layer)
    else:
        raise UnsupportedLayerError(
            f"to_tltorch: got {type(layer).__name__}, expected a CPConv, TuckerConv (not transposed), LowRankLinear,"
            " LowRankEmbedding or TensorizedEmbedding; tensorly-torch has no such layer; convert its to_dense()."
        )
    learns = any(weight_of(child).requires_grad for child in layer.children())
    for parameter in theirs.weight.parameters():
        parameter.requires_grad_(learns)
    bias = bias_of(layer.last)
    if bias is not None:
        theirs.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    converted: nn.Module = theirs.train(layer.training)
    return converted


def _to_conv(tltorch: Any, layer: CPConv | TuckerConv) -> Any:
    """Converts a convolution to a ``FactorizedConv``."""
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


def _to_linear(tltorch: Any, layer: LowRankLinear) -> Any:
    """Converts a linear layer to a ``FactorizedLinear`` in CP form."""
    up, down = _parameter(layer.up.weight), _parameter(layer.down.weight.mT)
    shape = (layer.out_features,), (layer.in_features,)
    weight = tltorch.CPTensorized(_parameter(torch.ones_like(up[0])), [up, down], shape, rank=layer.rank)
    return tltorch.FactorizedLinear(
        shape[1], shape[0], bias=bias_of(layer.last) is not None, factorization=weight, implementation="factorized"
    )


def _to_embedding(tltorch: Any, layer: LowRankEmbedding | TensorizedEmbedding) -> Any:
    """Converts an embedding to a ``FactorizedEmbedding`` in block TT form."""
    down = layer.down if isinstance(layer, LowRankEmbedding) else None
    if down is not None:
        assert isinstance(layer, LowRankEmbedding)
        if layer.max_norm is not None:
            _refuse(f"max_norm={layer.max_norm}", "renormalize the embedding once and drop it")
        for setting in ("scale_grad_by_freq", "sparse"):
            if getattr(down, setting):
                _refuse(f"{setting}=True", "drop it")
        cores = [down.weight[None, :, None], layer.up.weight.mT[:, None, :, None]]
    else:
        assert isinstance(layer, TensorizedEmbedding)
        cores = layer.cores()
        if layer.padding_idx is not None and not _is_zero(layer):
            _refuse(
                f"padding_idx={layer.padding_idx} where the cores are not zero and only a mask makes the vector zero",
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
    """Returns whether the cores themselves make the padding vector zero."""
    vector = layer.factors().to_dense()[layer.padding_idx]
    return not bool(vector.any())


def _parameter(tensor: Tensor) -> nn.Parameter:
    """Copies a tensor into a contiguous parameter."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def _refuse(setting: str, remedy: str) -> None:
    """Raises for a setting that tensorly-torch does not have."""
    raise UnsupportedLayerError(f"to_tltorch: got {setting}, which tensorly-torch cannot express; {remedy}.")
