"""The transforms of a model's keys and values, from their moments and those of the loss's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_transforms import KVTransforms
from .projections import by_group
from .rope import Rotation
from .settings import KVSettings
from .tile_frame import TileFrame
from .transform import Transform


@dataclass(frozen=True, eq=False)
class SideMoments:
    """Moments of the keys (without their rotation), or of the values, of one layer, all heads side by side, in fp64.

    Args:
        mean: ``[heads * size]``.
        covariance: ``[heads * size, heads * size]``.
        gradients: second moment of the gradients of the sum of all tokens' losses, of the same shape.
        size: number of entries per head.
        device: where the transform is needed.
    """

    mean: Tensor
    covariance: Tensor
    gradients: Tensor
    size: int
    device: torch.device


def fit_transforms(
    layers: Sequence[tuple[SideMoments, SideMoments]], rotations: Sequence[Rotation | None], settings: KVSettings
) -> KVTransforms:
    """The transforms of all layers.

    Args:
        layers: moments of keys and of values, by layer.
        rotations: the rotation of the keys of each layer, for the frame of a tile; ``None`` where they have none.
        settings: whether heads share a transform, and whether keys are in the frame of their tile.
    """
    made = []
    heads = [len(side.mean) // side.size for layer in layers for side in layer]
    joint = all(settings.together(n, layers[0][0].size) == n for n in heads)
    frames = rotations if settings.rotated == "tile" else [None] * len(layers)
    for (keys, values), rotation in zip(layers, frames, strict=True):
        frame = None if rotation is None else TileFrame(rotation, keys.size)
        # values are not centred: those of attention sinks are small, and must stay small
        uncentred = values.covariance + values.mean[:, None] * values.mean
        made.append(
            (
                _fit(keys, keys.mean, keys.covariance, frame, joint),
                _fit(values, torch.zeros_like(values.mean), uncentred, None, joint),
            )
        )
    return KVTransforms(tuple(made), layers[0][0].size, joint, settings.rotated, tuple(frames))


def _fit(side: SideMoments, mean: Tensor, second: Tensor, frame: TileFrame | None, joint: bool) -> Transform:
    metric = side.gradients.to(second)
    if frame is not None:
        second, metric = frame.average(second), frame.average(metric)
    width = len(mean) if joint else side.size
    fitted = Transform.fit(mean.view(1, -1, width), by_group(second, width), by_group(metric, width))
    assert fitted.metric is not None
    found = (fitted.mean, fitted.basis, fitted.variances, fitted.metric)
    return Transform(*(tensor.float().contiguous().to(side.device) for tensor in found))
