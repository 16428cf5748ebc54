"""The tensor that belongs to a weight, in another model or in a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .adapted_weight import AdaptedWeight, base_weight, values_of

Source = nn.Module | Mapping[str, Tensor]


def tensor_for(source: Source | None, weight: AdaptedWeight) -> Tensor | None:
    """The tensor of a source that has the name of a weight, or ``None``; for a slice, that slice of the fused one.

    Of a model it is the tensor that its layer stores: with merged adapters, without others.

    Args:
        source: a model, a state dict, or nothing.
        weight: a weight of another model.
    """
    if isinstance(source, nn.Module):
        try:
            return values_of(base_weight(source.get_submodule(weight.owner), weight.parameter)).detach()
        except AttributeError:
            return None
    tensors = {} if source is None else source
    found = tensors.get(weight.name)
    if found is None and weight.is_slice:
        fused = tensors.get(weight.name.removesuffix(weight.parameter) + weight.holder_name)
        found = None if fused is None else weight.slice_of(values_of(fused))
    return None if found is None else values_of(found).detach()
