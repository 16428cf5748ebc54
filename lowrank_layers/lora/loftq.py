"""Quantizing weights and choosing adapters that make up for it, in turns: LoftQ, algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checks import check_integer
from ..errors import LowRankError
from ..modules import check_model
from ..rank import Rank, check_rank
from .adapted_weight import AdaptedWeight
from .checks import check_adaptable
from .inits.base import InitContext, leading_triplets
from .inits.loftq import LoftQ
from .inject import DEFAULT, add_lora_
from .merge import users_of
from .ranks import note_lowered, rank_for
from .target import Target, targets

Quantize = Callable[[Tensor], Tensor]


@torch.no_grad()
def loftq_(
    model: nn.Module,
    rank: Rank,
    quantize: Quantize,
    *,
    steps: int = 5,
    target: Target = "all-linear",
    alpha: float | None = None,
    name: str = DEFAULT,
) -> nn.Module:
    r"""Quantizes weights and adds adapters that restore as much of them as their rank can, in place (Li et al., 2023).

    In turns :math:`Q = q(W - s B A)` and :math:`s B A = \mathrm{SVD}_r(W - Q)`, so that each makes up for the other.
    Rounding is no projection, and a later turn may be worse: the best of all is kept. Unlike :func:`add_lora_` this
    writes the base, which is then :math:`Q`.

    Args:
        model: any model of dense weights.
        rank: rank of the adapters: an integer, or a rank rule that reads the singular values of what the first rounding
            takes from a weight; an integer above what a matrix has is lowered, with a warning.
        quantize: from a weight to its values after quantizing, as a tensor of the same shape: rounded, not packed.
        steps: number of turns; with one, the plain weight is quantized.
        target: what to quantize and adapt, as in :func:`add_lora_`.
        alpha: scale of the adapters, as in :func:`add_lora_`.
        name: name of the adapter.

    Returns:
        The model.

    Raises:
        LowRankError: as :func:`add_lora_`, or if a weight is tied, factored or quantized already, or ``quantize``
            returns another shape or NaN; the model is as it was then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(32, 32))
        >>> weight = model[0].weight.detach().clone()
        >>> to_eighths = lambda w: (w * 8).round() / 8
        >>> _ = lr.loftq_(model, 8, to_eighths)
        >>> bool((model[0].weight - weight).norm() < (to_eighths(weight) - weight).norm())
        True

    Reference:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, ICLR 2024, algorithm 1.
    """
    check_model(model)
    check_integer(steps, "loftq_", "steps", 1)
    weights = targets(model, target)
    owners = users_of(model)
    for weight in weights:
        _check_dense(weight, owners)
        check_adaptable(weight, name)
    check_rank(rank, "loftq_")
    originals = {weight: weight.values.clone() for weight in weights}
    init = LoftQ({weight.name: original for weight, original in originals.items()})
    ranks: dict[str, int] = {}
    lowered: dict[str, int] = {}
    try:
        for weight, original in originals.items():
            weight.values.copy_(_quantized(quantize, original, weight.name))
            context = InitContext(weight)
            context = replace(context, rank=rank_for(rank, init, context, lowered))
            weight.values.copy_(_alternate(context, original, quantize, steps))
            ranks[weight.name] = context.rank
        add_lora_(model, target, 1, alpha, name=name, init=init, rank_pattern=ranks)
    except BaseException:
        for weight, original in originals.items():
            weight.values.copy_(original)
        raise
    note_lowered(lowered, "loftq_", 3)
    return model


def _check_dense(weight: AdaptedWeight, owners: dict[int, list[tuple[str, nn.Module]]]) -> None:
    """Raises if a weight cannot be quantized in place: it is a product of factors, or tied to another module's."""
    if weight.holder is None:
        raise LowRankError(
            f"loftq_: {weight.name!r} is a {type(weight.module).__name__}, whose weight is a product; quantize its"
            " factors."
        )
    others = [other for other, owner in owners[id(weight.holder)] if owner is not weight.module]
    if others:
        raise LowRankError(
            f"loftq_: the weight of {weight.name!r} is tied to {', '.join(map(repr, others))}, which quantizing would"
            " change; choose another target."
        )


def _alternate(context: InitContext, original: Tensor, quantize: Quantize, steps: int) -> Tensor:
    """The quantized weight that leaves least when its best correction is added.

    Args:
        context: the weight, which is quantized already, and the rank of the correction.
        original: the weight before it was quantized.
        quantize: the function that quantizes.
        steps: number of turns, the first included.
    """
    wide = original.to(torch.promote_types(original.dtype, torch.float32))
    layout, value = context.weight.layout, context.weight.values
    correction = torch.zeros_like(wide)
    best, least = original, float("inf")
    for step in range(steps):
        if step:
            value = _quantized(quantize, (wide - correction).to(original.dtype), context.weight.name)
        up, values, down = leading_triplets(layout.matrix(wide - value), context.rank)
        correction = layout.product(*layout.pair(original, down, up * values[..., None, :]))
        left = float(torch.linalg.vector_norm(wide - value - correction))
        if left < least:
            best, least = value, left
    return best


def _quantized(quantize: Quantize, weight: Tensor, label: str) -> Tensor:
    """The quantized weight, in its own dtype, once it is sure that it is one."""
    value = quantize(weight.clone())
    if not isinstance(value, Tensor) or value.shape != weight.shape or not bool(torch.isfinite(value).all()):
        got = f"NaN, Inf or shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LowRankError(
            f"loftq_: quantize returned {got} for {label!r}, expected finite values of shape {tuple(weight.shape)}."
        )
    return value.detach().to(weight)
