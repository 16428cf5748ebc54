"""OLoRA: an adapter starts as the leading part of the weight's QR decomposition."""

from __future__ import annotations

import math

import torch

from .base import InitContext, LoRAFactors, LoRAInit


class OLoRA(LoRAInit):
    """The adapter starts as the leading columns of ``Q`` and rows of ``R``, which are taken off the base.

    Reference:
        Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024.
    """

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        q, r = torch.linalg.qr(context.single_matrix("OLoRA"))
        root = math.sqrt(context.scaling)
        return LoRAFactors(r[: context.rank] / root, q[:, : context.rank] / root, subtract=True)
