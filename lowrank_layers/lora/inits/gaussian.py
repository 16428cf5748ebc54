"""A normal start: ``A`` with standard deviation ``1 / rank``."""

from __future__ import annotations

from .base import InitContext, LoRAFactors
from .kaiming import Kaiming


class Gaussian(Kaiming):
    """``A`` starts normal with standard deviation ``1 / rank``, ``B`` at zero; an embedding as in :class:`Kaiming`."""

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        if context.weight.is_lookup:
            return super().factors(context)
        *stack, _, columns = context.matrix.shape
        return LoRAFactors(context.normal(*stack, context.rank, columns) / context.rank)
