"""Subspaces from calibration: known before the first token is seen, and the same for every sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..calibrate.statistics import Statistics
from ..errors import LowRankError
from .calibrated_transforms import SideMoments, fit_transforms
from .kv_transforms import KVTransforms
from .projections import Projection, by_group, projections_of
from .rope import Rotation
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
    rotation: Rotation | Sequence[Rotation | None] | None = None,
) -> list[tuple[Subspace, Subspace]] | KVTransforms:
    r"""The subspaces that hold most of a model's keys and values, from calibration.

    With :math:`k = W x + b`, keys have the mean :math:`W \bar x + b` and the covariance :math:`W \mathrm{Cov}(x) W^T`.
    Known ahead, one basis serves all sequences: it is stored once, and pages of coefficients can be shared between
    them.

    With ``bits`` among the settings, all directions are kept, and they are chosen by what errors cost: statistics that
    were taken with a loss have the second moment :math:`G` of its gradients at keys and values, and an error
    :math:`e` increases the loss by :math:`e^T G e / 2`, in nats per token for a loss that is a mean over tokens.
    That measure is the same in every layer, for keys and for values. Keys are taken in the frame of their tile
    (``rope="tile"``): their covariance, and :math:`G`, are averaged over the places in it. Values are not centred.

    Args:
        model: a model with modules that have the two projections as children.
        stats: what :func:`calibrate` returned for this model, with a loss if ``bits`` are set;
            ``target=["k_proj", "v_proj"]`` is enough.
        settings: ranks or bits, and whether heads share a subspace; ``rope`` must be ``"before"``, since a projection
            knows no positions, or ``"tile"`` with bits.
        head_size: number of entries per head.
        keys: name of the projection to keys.
        values: name of the projection to values.
        rotation: the rotary position embedding of the keys, one for all layers or one per layer (``None`` where keys
            are not rotated); needed for ``rope="tile"`` only.

    Returns:
        One pair per layer, in the order of the modules, for ``LowRankCache(subspaces=...)``; a ``LowRankKV`` takes one
        pair. With bits they are :class:`~lowrank_layers.kv_cache.KVTransforms`, which can be saved.

    Raises:
        LowRankError: if no module has such children, one was not calibrated, or keys are normalized after their
            projection.

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
    known = ("before",) if settings.by_rank else ("before", "tile")
    if settings.rotated not in known:
        raise LowRankError(
            f"kv_subspaces: got rope={settings.rotated!r}, but a projection knows no positions; use rope={known[-1]!r}."
        )
    found = projections_of(model, stats, head_size, keys, values)
    if not settings.by_rank:
        rotations = _per_layer(rotation, len(found)) if settings.rotated == "tile" else [None] * len(found)
        return fit_transforms([(_moments(k, head_size), _moments(v, head_size)) for k, v in found], rotations, settings)
    return [(_subspace(k, head_size, settings, False), _subspace(v, head_size, settings, True)) for k, v in found]


def _subspace(projection: Projection, head_size: int, settings: KVSettings, values: bool) -> Subspace:
    heads = settings.together(projection.layer.out_features // head_size, head_size)
    mean, covariance = projection.mean(), projection.covariance()
    width = heads * head_size
    scatter = Scatter(
        projection.stats.inputs.rows, mean.view(1, -1, width).float(), by_group(covariance, width).float()
    )
    ranks = chosen_ranks(settings.rank_of(values=values), scatter, heads, "kv_subspaces")
    return scatter.fit(max(ranks), torch.float32)


def _moments(projection: Projection, head_size: int) -> SideMoments:
    gradients = projection.stats.gradients
    if gradients is None:
        raise LowRankError(
            f"kv_subspaces: {projection.label!r} was calibrated without a loss, and bits need its gradients; give"
            " stats=calibrate(model, batches, loss=SampledCrossEntropy())."
        )
    # statistics have the gradients of one sample's loss, its mean over positions
    gradients = gradients * projection.stats.positions**2
    device = projection.layer.weight.device
    return SideMoments(projection.mean(), projection.covariance(), gradients, head_size, device)


def _per_layer(rotation: Rotation | Sequence[Rotation | None] | None, layers: int) -> list[Rotation | None]:
    if rotation is None:
        raise LowRankError(
            "kv_subspaces: got rope='tile' without rotation=, which keys need to be brought into the frame of their"
            " tile; give the Rotation of the keys, or one per layer."
        )
    given: list[Rotation | None] = [rotation] * layers if isinstance(rotation, Rotation) else list(rotation)
    if len(given) != layers:
        raise LowRankError(f"kv_subspaces: got {len(given)} rotations, expected one for each of {layers} layers.")
    return given
