"""A dense layer described in plain values, so that a plan can name it, check it and price it without the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import LowRankError, MissingExtraError
from . import LowRankTransposedLinear, weight_of

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    **{f"Conv{d}d": _CONV for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (*_CONV, "output_padding") for d in (1, 2, 3)},
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "EmbeddingBag": ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset"),
    "Conv1D": ("nf", "nx"),
}
_NO_BIAS_ARGUMENT = ("Embedding", "EmbeddingBag", "Conv1D")

Spec = dict[str, Any]


def describe(module: nn.Module) -> Spec:
    """``{"type": "Linear", "in_features": ..., "bias": True, "dtype": "float32"}``."""
    kind = type(module).__name__
    spec: Spec = {"type": kind}
    for name in _SETTINGS[kind]:
        value = getattr(module, name)
        spec[name] = list(value) if isinstance(value, tuple) else value
    if kind not in _NO_BIAS_ARGUMENT:
        spec["bias"] = module.bias is not None
    spec["dtype"] = str(weight_of(module).dtype).removeprefix("torch.")
    return spec


def blank(spec: Spec) -> nn.Module:
    """The described layer on the meta device."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k not in ("type", "dtype")}
    dtype = getattr(torch, str(spec.get("dtype")), None)
    if spec.get("type") not in _SETTINGS or not isinstance(dtype, torch.dtype):
        raise LowRankError(f"got the layer description {spec!r}, expected a type out of {sorted(_SETTINGS)}.")
    try:
        if spec["type"] == "Conv1D":
            return LowRankTransposedLinear.blank(spec["nf"], spec["nx"], "meta", dtype)
        module: nn.Module = getattr(nn, spec["type"])(**settings, device="meta", dtype=dtype)
    except MissingExtraError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise LowRankError(f"got the layer description {spec!r}, which torch.nn refuses: {error}") from None
    return module
