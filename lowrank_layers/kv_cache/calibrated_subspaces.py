"""Subspaces before the first token is seen: from calibration, the same for every sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    r"""The best subspaces of the keys and values that linear layers make of calibrated inputs (Chang et al., 2024).

    With :math:`k = W x + b` their mean is :math:`W \bar x + b`, their covariance :math:`W \mathrm{Cov}(x) W^T`. Known
    ahead, one basis serves all sequences: it is stored once, and pages of coefficients can be shared between them.

    Args:
        model: whose modules have the two projections as children.
        stats: what :func:`calibrate` returned for this model.
        settings: the ranks, and whether heads share a subspace; ``rope`` must be ``"before"``, since a projection knows
            no positions.
        head_size: entries a head.
        keys: name of the projection to keys.
        values: name of the projection to values.

    Returns:
        One pair a layer, in the order of the modules: for ``LowRankKV(..., subspaces=pair)``.

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
    """
    if settings.rope != "before":
        raise LowRankError("kv_subspaces: got rope='after', but a projection knows no positions; use rope='before'.")
    found = []
    for name, module in model.named_modules():
        pair = [module._modules.get(child) for child in (keys, values)]
        if all(isinstance(layer, nn.Linear) for layer in pair):
            made = [
                _subspace(
                    layer, f"{name}.{child}" if name else child, stats, settings, head_size, values=child == values
                )
                for layer, child in zip(pair, (keys, values), strict=True)
                if isinstance(layer, nn.Linear)
            ]
            found.append((made[0], made[1]))
    if not found:
        raise LowRankError(f"kv_subspaces: no module has linear layers {keys!r} and {values!r}; give their names.")
    return found


def _subspace(
    layer: nn.Linear, name: str, stats: Statistics, settings: KVSettings, head_size: int, *, values: bool
) -> Subspace:
    if name not in stats:
        raise LowRankError(f"kv_subspaces: {name!r} was not calibrated; give stats=calibrate(model, batches).")
    if layer.out_features % head_size:
        raise LowRankError(f"kv_subspaces: {name!r} has {layer.out_features} outputs, no multiple of {head_size}.")
    inputs, heads = stats[name].inputs, layer.out_features // head_size
    weight = layer.weight.detach().double()
    mean = weight @ inputs.mean.to(weight) + (0 if layer.bias is None else layer.bias.detach().double())
    covariance = weight @ inputs.covariance().to(weight) @ weight.mT
    together = heads if settings.joint else 1
    scatter = Scatter(inputs.rows, *_by_group(mean, covariance, together * head_size))
    ranks = chosen_ranks(settings.rank_of(values), scatter, together, "kv_subspaces")
    return scatter.fit(max(ranks), torch.float32)


def _by_group(mean: Tensor, covariance: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``[1, groups, width]`` and the blocks on the diagonal, ``[1, groups, width, width]``, in fp32."""
    blocks = covariance.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return mean.view(1, -1, width).float(), blocks[None].float()
