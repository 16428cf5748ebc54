"""The tensor that belongs to a weight, in another model or in a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .adapted import base_weight, values_of
from .target import Place
from .weight_layout import SLICES

Source = nn.Module | Mapping[str, Tensor]


def tensor_for(source: Source | None, place: Place) -> Tensor | None:
    """What the source has under the name of a place; of a part of a fused weight, that part."""
    owner, name = place
    if isinstance(source, nn.Module):
        try:
            return values_of(base_weight(source.get_submodule(owner), name)).detach()
        except AttributeError:
            return None
    tensors = {} if source is None else source
    prefix = f"{owner}." if owner else ""
    found = tensors.get(prefix + name)
    fused = tensors.get(f"{prefix}in_proj_weight") if found is None and name in SLICES else None
    if fused is not None:
        found = values_of(fused).chunk(3)[SLICES.index(name)]
    return None if found is None else values_of(found).detach()
