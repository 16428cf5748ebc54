"""A transform with its bits, as it is stored: int8 columns, quantizers' steps, and an empty store of codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .bit_allocation import steps_of
from .bit_coefficients import BitCoefficients
from .quantizers import Widths
from .subspace import Subspace
from .tile_frame import TileFrame
from .transform import Transform


def bit_subspaces(
    transform: Transform, widths: Sequence[Widths], frame: TileFrame | None, *, shared: bool = False
) -> list[tuple[Subspace, BitCoefficients]]:
    """The directions that have bits, and a store for their coefficients, for every group of heads.

    Coefficients are in units of their quantizer's step.

    Args:
        transform: all directions.
        widths: the numbers of directions with each of ``WIDTHS`` bits, for every group.
        frame: the frame in which keys are stored; ``None`` is their own.
        shared: whether the transform is the model's, and not that of some tokens.
    """
    found = []
    for group, each in enumerate(widths):
        rank, own = sum(each), slice(group, group + 1)
        basis = transform.basis[:, own, :, :rank]
        steps = steps_of(transform.variances[:, own], each).float()
        largest = basis.abs().amax(2).clamp_min(1e-30)
        rounded = (basis * (127 / largest)[:, :, None]).round().to(torch.int8).contiguous()
        metric = None if transform.metric is None else transform.metric[:, own]
        scale = (largest / 127 * steps).float().contiguous()
        subspace = Subspace(rounded, transform.mean[:, own].float(), scale, metric, frame, shared)
        found.append((subspace, BitCoefficients(each, steps.square())))
    return found
