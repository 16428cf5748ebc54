"""Code of torch and transformers that reads the weights of layers instead of calling them, switched to our layers.

- In eval mode ``nn.TransformerEncoder`` and its layers run a fused kernel on their children's weights and skip their
  forward, unless an attribute says that they must not.
- transformers' ``resize_token_embeddings`` takes an embedding or a head for a plain layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import LowRankMultiheadAttention, is_compressed
from .resize_embeddings import update_resizing_

_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""The attribute that torch asks before it takes the fast path, and the value that forbids it."""
_DENSE_VALUE = "_fast_path_of_dense"


def update_shortcuts_(model: nn.Module) -> None:
    """Makes torch and transformers call low-rank and adapted layers, and take their shortcuts over dense ones again.

    To be called after layers of the model became low-rank, adapted or plain; :func:`replace_` does so itself.
    """
    for module in model.modules():
        _update_fast_path_(module)
        update_resizing_(module)


def _update_fast_path_(module: nn.Module) -> None:
    """Forbids a transformer module its fast path while a layer inside computes something of its own."""
    for kind, (flag, off) in _FAST_PATHS.items():
        if not isinstance(module, kind):
            continue
        special = any(map(_has_own_forward, module.modules()))
        if special and _DENSE_VALUE not in module.__dict__:
            module.__dict__[_DENSE_VALUE] = getattr(module, flag)
            setattr(module, flag, off)
        elif not special and _DENSE_VALUE in module.__dict__:
            setattr(module, flag, module.__dict__.pop(_DENSE_VALUE))


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a fast path would skip what the module computes: a layer of ours, an open attention, a whole copy."""
    own = is_compressed(module) or isinstance(module, LowRankMultiheadAttention)
    return own or hasattr(module, "skipped_by_fast_paths")
