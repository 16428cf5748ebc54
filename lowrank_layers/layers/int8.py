"""Which layers can be stored in int8, alone or as the factors of another one."""

from __future__ import annotations

from torch import nn

from ..errors import LowRankError
from ..linalg import check_tensor
from .base import FactoredModule
from .embedding import LowRankEmbedding
from .int8_embedding import Int8Embedding
from .int8_layer import Int8Layer
from .int8_linear import Int8Linear
from .linear import LowRankLinear
from .weights import bias_of, weight_of

INT8_LAYERS: dict[str, type[Int8Layer]] = {cls.__name__: cls for cls in (Int8Linear, Int8Embedding)}
"""The layers in int8 by class name, for checkpoints."""
FACTORS = (LowRankLinear, LowRankEmbedding)
"""Factored layers whose factors can be stored in int8, with the classes derived from them."""


def is_int8(module: nn.Module) -> bool:
    """Returns whether a module is a layer in int8; one whose factors are is not."""
    return isinstance(module, Int8Layer)


def is_compressed(module: nn.Module) -> bool:
    """Returns whether a module is one of this library's layers in the place of a dense one."""
    return isinstance(module, (FactoredModule, Int8Layer))


def bits_of(module: nn.Module) -> int | None:
    """Returns 8 for a layer in int8 and for a factored one with such factors; ``None`` for floating point."""
    parts = module.parts if isinstance(module, FactoredModule) else [module]
    return 8 if any(map(is_int8, parts)) else None


def int8_for(module: nn.Module) -> type[Int8Layer] | None:
    """Returns the class that replaces a dense layer in int8, if one does."""
    return next((cls for cls in INT8_LAYERS.values() if cls.stands_for(module)), None)


def round_factors_(layer: FactoredModule, *, filled: bool = True) -> FactoredModule:
    """Stores the factors of a layer in int8, in place: its children become layers in int8.

    Args:
        layer: a low-rank or pivot linear layer, or a low-rank embedding without ``max_norm``.
        filled: whether the factors have values; otherwise the new ones are uninitialized.

    Returns:
        The layer itself.

    Raises:
        LowRankError: for a layer of another kind.

    Examples:
        >>> from lowrank_layers.layers.int8 import round_factors_
        >>> round_factors_(lr.LowRankLinear(64, 32, rank=4))
        LowRankLinear(
          in_features=64, out_features=32, bias=True, rank=4
          (down): Int8Linear(in_features=64, out_features=4, bias=False)
          (up): Int8Linear(in_features=4, out_features=32, bias=True)
        )
    """
    kinds = [int8_for(part) for part in layer.parts]
    if not isinstance(layer, FACTORS) or None in kinds or getattr(layer, "max_norm", None) is not None:
        raise LowRankError(
            f"got a {type(layer).__name__}, expected a low-rank or pivot linear layer, or a low-rank embedding without"
            " max_norm, whose factors can be stored in int8; leave this one in floating point."
        )
    names = [name for name, child in layer.named_children() if child in layer.parts]
    new = [kind.like(part) for kind, part in zip(kinds, layer.parts, strict=True) if kind is not None]
    for part, rounded in zip(layer.parts, new, strict=True) if filled else ():
        weight = weight_of(part)
        rounded.fill_(check_tensor(weight, type(layer).__name__) if weight.numel() else weight, bias_of(part))
    for name, rounded in zip(names, new, strict=True):
        setattr(layer, name, rounded)
    return layer
