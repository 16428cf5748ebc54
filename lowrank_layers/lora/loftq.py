"""Quantising weights and choosing adapters together, in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules.tree import check_model
from ..rank import Rank, check_rank
from .checks import check_adaptable
from .inits import Start, triplets
from .inject import DEFAULT, add_lora_
from .merge import users_of
from .ranks import note_lowered, rank_for
from .target import Place, Target, targets
from .weight_layout import Kind

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
    r"""Quantises weights and adds adapters that restore as much of them as their rank can, in place (Li et al., 2023).

    In turns :math:`Q = q(W - s B A)` and :math:`s B A = \mathrm{SVD}_r(W - Q)`, so that each makes up for the other.
    Rounding is no projection, and a later turn may be worse: the best of all is kept. Unlike :func:`add_lora_` this
    writes the base, which is then :math:`Q`.

    Args:
        model: any model of dense weights.
        rank: of the adapters: an integer, or a rank rule that reads the singular values of what the first rounding
            takes from a weight; an integer above what a matrix has is lowered, with a warning.
        quantize: the values of a weight after quantising, as a tensor of the same shape: rounded, not packed.
        steps: how many turns; with one, the plain weight is quantised.
        target: what to quantise and adapt, as in :func:`add_lora_`.
        alpha: as in :func:`add_lora_`.
        name: of the adapter.

    Returns:
        The model.

    Raises:
        LowRankError: as :func:`add_lora_`, or if a weight is tied, factored or quantised already, or ``quantize``
            returns another shape or NaN; the model is as it was then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(32, 32))
        >>> weight = model[0].weight.detach().clone()
        >>> to_eighths = lambda w: (w * 8).round() / 8
        >>> _ = lr.loftq_(model, 8, to_eighths)
        >>> bool((model[0].weight - weight).norm() < (to_eighths(weight) - weight).norm())
        True

    Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, algorithm 1.
    """
    check_model(model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise LowRankError(f"loftq_: got steps {steps!r}, expected an integer of at least 1.")
    places = targets(model, target)
    owners = users_of(model)
    for place in places:
        _check_own(place, owners)
        check_adaptable(place, name)
    check_rank(rank, "loftq_")
    kept = {place: place.base.detach().clone() for place in places}
    ranks: dict[str, int] = {}
    lowered: dict[str, int] = {}
    found: dict[Place, Tensor] = {}
    for place, weight in kept.items():
        label, kind = place.name, place.layout
        first = _quantized(quantize, weight, label)
        ranks[label] = rank_for(rank, "loftq", Start(first, kind, 1, 1.0, None, reference=weight), label, lowered)
        found[place] = _alternate(weight, first, kind, ranks[label], quantize, steps, label)
    reference = {place.name: weight for place, weight in kept.items()}
    try:
        for place, value in found.items():
            place.base.detach().copy_(value)
        add_lora_(model, target, 1, alpha, name=name, init="loftq", rank_pattern=ranks, reference=reference)
    except BaseException:
        for place, weight in kept.items():
            place.base.detach().copy_(weight)
        raise
    note_lowered(lowered, "loftq_", 3)
    return model


def _check_own(place: Place, owners: dict[int, list[tuple[str, nn.Module]]]) -> None:
    module, label, weight = place.module, place.name, place.holder
    if weight is None:
        raise LowRankError(
            f"loftq_: {label!r} is a {type(module).__name__}, whose weight is a product; quantise its factors."
        )
    others = [other for other, owner in owners[id(weight)] if owner is not module]
    if others:
        raise LowRankError(
            f"loftq_: the weight of {label!r} is tied to {', '.join(map(repr, others))}, which quantising would change;"
            " choose another target."
        )


def _alternate(
    weight: Tensor, first: Tensor, kind: Kind, rank: int, quantize: Quantize, steps: int, label: str
) -> Tensor:
    """The quantised weight that leaves least when its best correction is added; ``first`` is that of the weight."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    correction = torch.zeros_like(wide)
    best, least = weight, float("inf")
    for step in range(steps):
        value = _quantized(quantize, (wide - correction).to(weight.dtype), label) if step else first
        residual = wide - value
        up, values, down = triplets(kind.matrix(residual), rank)
        correction = kind.product(*kind.pair(weight, down, up * values[..., None, :]))
        left = float(torch.linalg.vector_norm(residual - correction))
        if left < least:
            best, least = value, left
    return best


def _quantized(quantize: Quantize, weight: Tensor, label: str) -> Tensor:
    value = quantize(weight.clone())
    if not isinstance(value, Tensor) or value.shape != weight.shape or not bool(torch.isfinite(value).all()):
        got = f"NaN, Inf or shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LowRankError(
            f"loftq_: quantize returned {got} for {label!r}, expected finite values of shape {tuple(weight.shape)}."
        )
    return value.detach().to(weight)
