"""The transforms of a model's keys and values, from the statistics of its projections."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import LowRankError
from .kv_transforms import KVTransforms
from .projections import Projection, by_group
from .rope import Rotation
from .settings import KVSettings
from .tile_frame import TileFrame
from .transform import Transform


def fit_transforms(
    projections: Sequence[tuple[Projection, Projection]],
    head_size: int,
    settings: KVSettings,
    rotation: Rotation | Sequence[Rotation | None] | None,
) -> KVTransforms:
    """The transforms of all layers.

    Args:
        projections: those to keys and to values, layer by layer.
        head_size: number of entries per head.
        settings: whether heads share a transform, and whether keys are in the frame of their tile.
        rotation: of the keys, for all layers or for each.

    Raises:
        LowRankError: without gradients, or without the rotations that the frame of a tile needs.
    """
    rotations = _per_layer(rotation, len(projections)) if settings.rotated == "tile" else [None] * len(projections)
    made = []
    for (keys, values), own in zip(projections, rotations, strict=True):
        frame = None if own is None else TileFrame(own, head_size)
        mean, covariance = values.mean(), values.covariance()
        uncentred = covariance + mean[:, None] * mean
        made.append(
            (
                _fit(keys, keys.mean(), keys.covariance(), frame, head_size, settings.joint),
                _fit(values, mean.new_zeros(mean.shape), uncentred, None, head_size, settings.joint),
            )
        )
    return KVTransforms(tuple(made), head_size, settings.joint, settings.rotated, tuple(rotations))


def _fit(
    projection: Projection, mean: Tensor, covariance: Tensor, frame: TileFrame | None, head_size: int, joint: bool
) -> Transform:
    gradients = projection.stats.gradients
    if gradients is None:
        raise LowRankError(
            f"kv_subspaces: {projection.label!r} was calibrated without a loss, and bits need its gradients; give"
            " stats=calibrate(model, batches, loss=SampledCrossEntropy())."
        )
    # statistics have the gradients of one sample's loss, its mean over positions; an error per token costs their sum
    metric = gradients.to(covariance) * projection.stats.positions**2
    if frame is not None:
        covariance, metric = frame.average(covariance), frame.average(metric)
    width = len(mean) if joint else head_size
    fitted = Transform.fit(mean.view(1, -1, width), by_group(covariance, width), by_group(metric, width))
    assert fitted.metric is not None
    device = projection.layer.weight.device
    mean, basis, variances, metric = (
        tensor.float().contiguous().to(device)
        for tensor in (fitted.mean, fitted.basis, fitted.variances, fitted.metric)
    )
    return Transform(mean, basis, variances, metric)


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
