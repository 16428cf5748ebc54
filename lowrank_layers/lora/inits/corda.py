"""CorDA: an adapter starts as the part of the weight that matters most on the layer's inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from ...calibrate.statistics import Statistics
from ...decompose import svd
from ...linalg import damp, psd_root
from .base import InitContext, LoRAFactors, LoRAInit, singular_values
from .moments import check_moment, check_statistics

_DAMPING = 1e-3


@dataclass(frozen=True, eq=False)
class CorDA(LoRAInit):
    r"""The adapter starts as the leading triplets of :math:`W C` times :math:`C^{-1}`, with :math:`C = E[x x^T]`.

    That product is taken off the base, so that the model starts where the base is.

    Args:
        stats: what :func:`calibrate` returned for the model.

    Raises:
        LowRankError: for anything but statistics.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)])
        >>> model = lr.add_lora_(model, rank=2, init=lr.CorDA(stats))

    Reference:
        Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, NeurIPS 2024.
    """

    stats: Statistics = field(repr=False)

    def __post_init__(self) -> None:
        check_statistics(self.stats, "CorDA")

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        root = psd_root(damp(check_moment(self.stats, context, "CorDA"), _DAMPING))
        weighted = context.single_matrix("CorDA").double() @ (root.factor.mT @ root.factor)
        up, down = svd(weighted, context.rank).pair()
        size = math.sqrt(context.scaling)
        return LoRAFactors(root.solve(down.mT).mT / size, up / size, subtract=True)

    def singular_values(self, context: InitContext) -> Tensor:
        """The singular values of the weight times the second moment of its inputs."""
        moment = damp(check_moment(self.stats, context, "CorDA"), _DAMPING)
        return singular_values(context.single_matrix("CorDA").double() @ moment)
