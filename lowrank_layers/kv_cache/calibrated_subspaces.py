"""Subspaces from calibration: known before the first token is seen, and the same for every sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..calibrate.moments import Moments
from ..calibrate.statistics import Statistics
from ..errors import LowRankError
from .settings import KVSettings
from .subspace import Scatter, Subspace, chosen_ranks


def kv_subspaces(
    model: nn.Module,
    stats: Statistics,
    settings: KVSettings,
    *,
    head_size: int,
    keys: str = "k_proj",
    values: str = "v_proj",
) -> list[tuple[Subspace, Subspace]]:
    r"""The subspaces that hold most of a model's keys and values, from calibration.

    With :math:`k = W x + b`, keys have the mean :math:`W \bar x + b` and the covariance :math:`W \mathrm{Cov}(x) W^T`.
    Known ahead, one basis serves all sequences: it is stored once, and pages of coefficients can be shared between
    them.

    Args:
        model: a model with modules that have the two projections as children.
        stats: what :func:`calibrate` returned for this model.
        settings: the ranks, and whether heads share a subspace; ``rope`` must be ``"before"``, since a projection knows
            no positions.
        head_size: number of entries per head.
        keys: name of the projection to keys.
        values: name of the projection to values.

    Returns:
        One pair per layer, in the order of the modules, for ``LowRankCache(subspaces=...)``; a ``LowRankKV`` takes one
        pair.

    Raises:
        LowRankError: if no module has such children, or one was not calibrated.

    Examples:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.k_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        ...
        ...     def forward(self, x):
        ...         return self.k_proj(x) + self.v_proj(x)
        >>> model = Attention()
        >>> stats = lr.calibrate(model, [torch.randn(100, 8)])
        >>> (pair,) = lr.kv_subspaces(model, stats, lr.KVSettings(rank=2), head_size=8)
        >>> pair[0].basis.shape
        torch.Size([1, 1, 16, 4])

    Chang et al., "Palu: Compressing KV-Cache with Low-Rank Projection", 2024.
    """
    if settings.rotated != "before":
        raise LowRankError("kv_subspaces: got rope='after', but a projection knows no positions; use rope='before'.")
    found = []
    for name, module in model.named_modules():
        pair = [module._modules.get(child) for child in (keys, values)]
        sides = [layer for layer in pair if isinstance(layer, nn.Linear)]
        if len(sides) < 2:
            continue
        made = []
        for layer, child in zip(sides, (keys, values), strict=True):
            label = f"{name}.{child}" if name else child
            _check(label, layer, stats, head_size)
            together = layer.out_features // head_size if settings.joint else 1
            scatter = _scatter(layer, stats[label].inputs, together * head_size)
            ranks = chosen_ranks(settings.rank_of(values=child == values), scatter, together, "kv_subspaces")
            made.append(scatter.fit(max(ranks), torch.float32))
        found.append((made[0], made[1]))
    if not found:
        raise LowRankError(f"kv_subspaces: no module has linear layers {keys!r} and {values!r}; give their names.")
    return found


def _check(label: str, layer: nn.Linear, stats: Statistics, head_size: int) -> None:
    if label not in stats:
        raise LowRankError(f"kv_subspaces: {label!r} was not calibrated; give stats=calibrate(model, batches).")
    if layer.out_features % head_size:
        raise LowRankError(f"kv_subspaces: {label!r} has {layer.out_features} outputs, no multiple of {head_size}.")


def _scatter(layer: nn.Linear, inputs: Moments, width: int) -> Scatter:
    """Mean and second moment of a layer's outputs, for each group of ``width`` of them."""
    weight = layer.weight.detach().double()
    mean = weight @ inputs.mean.to(weight) + (0 if layer.bias is None else layer.bias.detach().double())
    covariance = weight @ inputs.covariance().to(weight) @ weight.mT
    return Scatter(inputs.rows, *_by_group(mean, covariance, width))


def _by_group(mean: Tensor, covariance: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``[1, groups, width]`` and the blocks on the diagonal, ``[1, groups, width, width]``, in fp32."""
    blocks = covariance.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return mean.view(1, -1, width).float(), blocks[None].float()
