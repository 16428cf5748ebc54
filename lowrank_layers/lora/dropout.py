"""Dropout on the input of a linear adapter that keeps no dropped copy of it for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dropped_linear(input: Tensor, weight: Tensor, p: float) -> Tensor:
    """``F.linear(F.dropout(input, p), weight)`` with a mask of its own in every call, as in PEFT.

    Autograd keeps the input, which all layers that read it share, and one byte per entry for the mask; the dropped
    input is computed again in the backward pass.

    Args:
        input: the input, ``[N, in]``.
        weight: the weight, ``[out, in]``.
        p: the probability of an entry to be dropped.
    """
    if torch.compiler.is_compiling() or input.is_inference():
        return F.linear(F.dropout(input, p), weight)
    kept = torch.empty_like(input, dtype=torch.uint8, requires_grad=False).bernoulli_(1 - p)
    out: Tensor = _DroppedLinear.apply(input, weight, kept, 1 / (1 - p))  # type: ignore[no-untyped-call]
    return out


class _DroppedLinear(torch.autograd.Function):
    """``scale * F.linear(input * kept, weight)``; under autocast both passes compute in the dtype of the output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, kept: Tensor, scale: float) -> Tensor:
        return F.linear(input * kept, weight) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, kept, ctx.scale = inputs
        ctx.save_for_backward(input, weight, kept)
        ctx.save_for_forward(input, weight, kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, kept = ctx.saved_tensors
        gradient = gradients[0] * ctx.scale
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            to_input = (gradient @ weight.to(gradient.dtype)).to(input.dtype) * kept
        if ctx.needs_input_grad[1]:
            to_weight = (gradient.mT @ (input * kept).to(gradient.dtype)).to(weight.dtype)
        return to_input, to_weight, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        input, weight, kept = ctx.saved_tensors
        of_input, of_weight = (None if t is None else t * ctx.scale for t in tangents[:2])
        parts = [] if of_input is None else [F.linear(of_input * kept, weight)]
        parts += [] if of_weight is None else [F.linear(input * kept, of_weight)]
        return sum(parts[1:], parts[0])
