"""How far second moments are pulled towards multiples of the identity."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from ..checks import is_number
from ..errors import LowRankError

ROUNDINGS = 64
"""Rounding errors of a second moment, in units of the last place of its mean."""


@dataclass(frozen=True)
class Damping:
    """Ridges on the two second moments that weight the approximation of a layer.

    Moments are measured on few samples. A ridge keeps the directions that these samples never showed from counting
    for nothing. :func:`make_plan` takes it; the plan keeps it, so that :func:`factorize_` weights layers likewise.

    A ridge ``a`` is a shrinkage towards the scaled identity (Ledoit and Wolf, 2004): with ``s = a / (1 + a)`` and
    ``m`` the mean of the diagonal of ``A``, ``A + a m I = (1 + a) ((1 - s) A + s m I)``, and a factor that all layers
    have changes nothing. So a shrinkage of 0.3 is a ridge of 0.3 / 0.7.

    Args:
        inputs: ridge on the second moment of the inputs, relative to their mean variance; it pulls the approximation
            towards that of the plain weight.
        outputs: ridge on the second moment of the loss's gradients at the outputs, relative to their mean; outputs that
            the calibration samples found unimportant keep some weight.

    Raises:
        LowRankError: if a ridge is negative or no finite number.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> stats = lr.calibrate(model, [torch.randn(100, 64)])
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats, damping=lr.Damping(inputs=1e-2))
        >>> plan.damping
        Damping(inputs=0.01, outputs=0.1)
        >>> model = lr.factorize_(model, plan, stats=stats)
    """

    inputs: float = 1e-3
    outputs: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_number(value) or not (0 <= value < math.inf):
                raise LowRankError(
                    f"Damping: got {field.name}={value!r}, expected a finite number that is not negative, such as"
                    f" {field.default}."
                )


def rounding_of(dtype: torch.dtype) -> float:
    """Returns how much of a second moment's mean is the rounding of its products, from which nothing is predicted.

    Args:
        dtype: the dtype of the weights; products are taken in fp32 at least.
    """
    return ROUNDINGS * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
