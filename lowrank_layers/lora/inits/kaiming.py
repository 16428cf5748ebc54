"""The usual start: one factor as torch's own layers start, the other zero."""

from __future__ import annotations

import math

import torch

from .base import InitContext, LoRAFactors, LoRAInit


class Kaiming(LoRAInit):
    """``A`` starts as the weight of a new linear layer, ``B`` at zero; of an embedding, ``A`` at zero, ``B`` normal."""

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        *stack, rows, columns = context.matrix.shape
        if context.weight.is_lookup:
            return LoRAFactors(up=context.normal(*stack, rows, context.rank))
        values = torch.rand(*stack, context.rank, columns, generator=context.generator, dtype=torch.float32) * 2 - 1
        return LoRAFactors(down=values * (1 / math.sqrt(columns)))
