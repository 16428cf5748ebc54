"""A random start whose directions are orthonormal."""

from __future__ import annotations

import torch

from .base import InitContext, LoRAFactors, LoRAInit


class Orthogonal(LoRAInit):
    """``A`` starts with random orthonormal rows, ``B`` at zero; of an embedding, ``B`` with orthonormal columns."""

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        *stack, rows, columns = context.matrix.shape
        side = rows if context.weight.is_lookup else columns
        q = torch.linalg.qr(context.normal(*stack, side, context.rank)).Q
        return LoRAFactors(up=q) if context.weight.is_lookup else LoRAFactors(down=q.mT)
