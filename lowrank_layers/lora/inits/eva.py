"""EVA: adapters start at the leading directions of their layers' inputs, and share a budget of ranks by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calibrate.statistics import Statistics
from ...linalg import leading_eigenvectors
from .base import InitContext, LoRAFactors, LoRAInit
from .moments import check_moment, check_statistics, input_moment


@dataclass(frozen=True, eq=False)
class EVA(LoRAInit):
    """``A`` starts at the leading directions of the layer's inputs, ``B`` at zero.

    An integer rank is an average: the directions that explain most of the variance of their layer's inputs share
    ``rank`` times the number of layers.

    Args:
        stats: what :func:`calibrate` returned for the model.

    Raises:
        LowRankError: for anything but statistics.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> stats = lr.calibrate(model, [torch.randn(32, 8)])
        >>> model = lr.add_lora_(model, rank=2, init=lr.EVA(stats))
        >>> sum(len(layer.lora_weight.adapters["default"].A) for layer in model)
        4

    Reference:
        Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024.
    """

    stats: Statistics = field(repr=False)

    def __post_init__(self) -> None:
        check_statistics(self.stats, "EVA")

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        return LoRAFactors(down=leading_eigenvectors(check_moment(self.stats, context, "EVA"), context.rank).mT)

    def singular_values(self, context: InitContext) -> Tensor:
        """The root mean squares of the inputs along their principal directions."""
        variances: Tensor = torch.linalg.eigvalsh(check_moment(self.stats, context, "EVA")).flip(0).clamp_min(0)
        return variances.sqrt()

    def ranks(self, contexts: Sequence[InitContext], rank: int) -> list[int]:
        """The budget goes to the directions that explain most of the variance of their layer's inputs."""
        explained: list[tuple[float, int]] = []
        for index, context in enumerate(contexts):
            moment = input_moment(self.stats, context)
            if moment is not None:
                variances = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
                shares = variances / variances.sum().clamp_min(1e-300)
                explained += [(share, index) for share in shares[: context.limit].tolist()]
        known = {index for _, index in explained}
        explained.sort(key=lambda pair: -pair[0])
        counts = Counter(index for _, index in explained[: rank * len(known)])
        return [max(1, counts[index]) if index in known else rank for index in range(len(contexts))]
