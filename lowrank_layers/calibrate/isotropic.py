"""Moments of gradients in the place of which a multiple of the identity stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import LowRankError
from ..modules import matches_name
from .layer_stats import LayerStats
from .readable import Unread, Value


def isotropic_layers(layers: Mapping[str, LayerStats], names: Iterable[str]) -> dict[str, LayerStats]:
    """Returns the statistics, those of the chosen layers with the identity times the mean of the diagonal of ``G``.

    Args:
        layers: the statistics by layer.
        names: names of layers, ends of them, or names of modules around them.

    Raises:
        LowRankError: for a name that matches no layer, and layers without gradients.
    """
    if isinstance(names, str):
        raise LowRankError(f"isotropic: got {names!r}, expected a list; write [{names!r}].")
    found = dict(layers)
    for chosen in names:
        own = [name for name in layers if matches_name(chosen, name)]
        if not own:
            raise LowRankError(f"isotropic: {chosen!r} matches no layer of these statistics.")
        for name in own:
            gradients = vars(layers[name])["gradients"]
            if gradients is None:
                raise LowRankError(f"isotropic: {name!r} has no moment of gradients; calibrate with a loss.")
            found[name] = layers[name].changed(gradients=_isotropic(gradients))
    return found


def _isotropic(moment: Value) -> Value:
    """``I tr(G) / m``, group by group; read each time it is asked for if ``G`` is."""
    if isinstance(moment, Unread):
        return Unread(moment.shape, lambda: _scaled_identity(moment.read()))
    return _scaled_identity(moment)


def _scaled_identity(moment: Tensor) -> Tensor:
    if moment.shape[-2] != moment.shape[-1]:  # a sketch, whose first column is the diagonal
        return torch.cat([moment[:, :1].mean().expand(len(moment), 1), torch.zeros_like(moment[:, 1:])], 1)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
