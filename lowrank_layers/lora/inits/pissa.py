"""PiSSA: an adapter starts as the leading part of the weight's singular value decomposition."""

from __future__ import annotations

import math

from ...decompose import svd
from .base import InitContext, LoRAFactors, LoRAInit


class PiSSA(LoRAInit):
    """The adapter starts as the weight's leading singular triplets, which are taken off the base.

    Reference:
        Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation, NeurIPS 2024.
    """

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        up, down = svd(context.single_matrix("PiSSA"), context.rank).pair()
        root = math.sqrt(context.scaling)
        return LoRAFactors(down / root, up / root, subtract=True)
