"""Undoing a factorization."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import PROJECTIONS, FactoredModule, Int8Layer, LowRankMultiheadAttention
from ..linalg import full_precision
from ..modules import (
    check_densifiable,
    check_factors,
    check_model,
    check_optimizer,
    open_attentions,
    replace_,
    walk_layers,
)


@full_precision
def densify_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Multiplies the factors out: every factored layer becomes the torch layer that computes the same, in place.

    Layers in int8 become those in floating point of the same values.

    Args:
        model: a model with factored layers, or layers in int8; one without comes back as it is.
        optimizer: the optimizer of the model; it is given the new parameters in the place of the old ones.

    Returns:
        The model.

    Raises:
        LowRankError: if a factored layer carries hooks or a forward of its own; nothing is changed then.

    Examples:
        >>> lr.densify_(nn.Sequential(lr.LowRankLinear(8, 4, rank=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_model(model)
    check_optimizer(optimizer, "densify_")
    check_factors(model)
    check_densifiable(model)
    dense = {
        name: module.to_dense()
        for name, module in walk_layers(model)
        if isinstance(module, (FactoredModule, Int8Layer))
    }
    replace_(model, dense, optimizer)
    closable = {name: attention for name, attention in open_attentions(model).items() if _is_dense(attention)}
    replace_(model, {name: attention.to_dense() for name, attention in closable.items()}, optimizer)
    return model


def _is_dense(attention: LowRankMultiheadAttention) -> bool:
    """Whether all projections are plain linear layers: what an adapter adds to one would not survive closing."""
    return all(type(getattr(attention, name)) is nn.Linear for name in PROJECTIONS)
