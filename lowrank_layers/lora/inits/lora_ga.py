"""LoRA-GA: adapters start so that their first step follows the full gradient of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...checks import is_number
from ...errors import LowRankError
from ..lookup import tensor_for
from .base import InitContext, LoRAFactors, LoRAInit, check_fits, leading_triplets, singular_values


@dataclass(frozen=True, eq=False)
class LoRAGA(LoRAInit):
    r"""``A`` starts at the leading ``r`` right singular vectors of the gradient, ``B`` at the next ``r`` left ones.

    A small step of plain gradient descent then moves the weight along the best approximation of rank ``2 r`` of its
    gradient, so that the rank is at most half of the smaller side. Both factors have the paper's size
    :math:`d_{out}^{1/4} / \sqrt{\gamma}`, and their product is taken off the base.

    Args:
        gradients: what :func:`weight_gradients` returned for the model: gradients by the weights' names.
        gamma: the larger, the smaller are both factors.

    Raises:
        LowRankError: for gradients that are no mapping, or a ``gamma`` that is not positive.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 8), torch.randint(4, (32,)))]
        >>> gradients = lr.weight_gradients(model, batches, nn.functional.cross_entropy)
        >>> model = lr.add_lora_(model, rank=2, init=lr.LoRAGA(gradients))

    Reference:
        Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, NeurIPS 2024, algorithm 1.
    """

    gradients: Mapping[str, Tensor] = field(repr=False)
    gamma: float = 16.0

    def __post_init__(self) -> None:
        if not isinstance(self.gradients, Mapping):
            raise LowRankError(
                f"LoRAGA: got gradients of type {type(self.gradients).__name__}, expected weight_gradients(model,"
                " batches, loss)."
            )
        if not is_number(self.gamma) or not 0 < self.gamma < math.inf:
            raise LowRankError(f"LoRAGA: got gamma={self.gamma!r}, expected a positive number.")

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        gradient, rank = self._gradient(context), context.rank
        if 2 * rank > min(gradient.shape[-2:]):
            raise LowRankError(
                f"add_lora_: init LoRAGA takes 2 x {rank} directions, and {context.weight.name!r} of shape"
                f" {tuple(context.weight.values.shape)} has {min(gradient.shape[-2:])}; leave it out with exclude=."
            )
        up, _, down = leading_triplets(gradient, 2 * rank)
        size = gradient.shape[-2] ** 0.25 / math.sqrt(self.gamma)
        return LoRAFactors(size * down[..., :rank, :], size * up[..., rank:], subtract=True)

    def limit(self, context: InitContext) -> int:
        """Half of the smaller side."""
        return max(1, context.limit // 2)

    def singular_values(self, context: InitContext) -> Tensor:
        """The singular values of the gradient."""
        return singular_values(self._gradient(context))

    def _gradient(self, context: InitContext) -> Tensor:
        found = tensor_for(self.gradients, context.weight)
        remedy = "weight_gradients(model, batches, loss) of this model"
        return context.weight.layout.matrix(check_fits(found, context, "LoRAGA", remedy))
