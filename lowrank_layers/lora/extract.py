"""What a fine-tune changed, as adapters of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..decompose import svd
from ..errors import LowRankError
from ..modules import check_model, update_shortcuts_
from ..rank import Energy, Rank, Spectrum, choose_rank
from .adapted_weight import AdaptedWeight
from .adapter import Adapter, adapter_dtype
from .attach import attach_, freeze_
from .checks import check_adaptable
from .lookup import tensor_for
from .target import Target, targets
from .weight_layout import Kind, Matrix


@dataclass(frozen=True)
class Extracted:
    """The change of one weight at low rank.

    Args:
        a: ``A``.
        b: ``B``.
        rank: of their product, for a stack of matrices of each.
        energy: how much of the squared change they hold, in [0, 1].
        change: the change's norm relative to the weight's.
    """

    a: Tensor
    b: Tensor
    rank: int
    energy: float
    change: float


class Extraction(dict[tuple[str, str], Extracted]):
    """What :func:`extract_lora` found, by module and parameter: prints as a table, and becomes adapters of the base.

    Examples:
        >>> base, tuned = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        >>> found = lr.extract_lora(base, tuned, rank=8)
        >>> with torch.no_grad():
        ...     _ = base[0].bias.copy_(tuned[0].bias)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(found.apply_(base)(x), tuned(x), atol=1e-5)
        True
    """

    def apply_(self, model: nn.Module, name: str = "extracted") -> nn.Module:
        """Adds them to the base as an adapter of that name, in place; returns the model.

        Raises:
            LowRankError: if the model has not these weights, or an adapter of that name; nothing changes then.
        """
        check_model(model)
        if not name or "." in name:
            raise LowRankError(f"Extraction.apply_: got name {name!r}, expected one without dots.")
        made = {_checked(model, *place, found, name): found for place, found in self.items()}
        freeze_(model)
        for weight, found in made.items():
            # copies: an extraction may be applied to several models, which are trained apart
            attach_(weight, name, Adapter(found.a.clone(), found.b.clone(), scaling=1.0))
        update_shortcuts_(model)
        return model

    def __str__(self) -> str:
        rows = [("weight", "rank", "change", "energy kept")]
        for (owner, parameter), found in self.items():
            rows.append((f"{owner}.{parameter}", str(found.rank), f"{found.change:.2%}", f"{found.energy:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = widths
        template = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
        return "\n".join(template.format(*row) for row in rows)


def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    rank: Rank | None = None,
    *,
    energy: float | None = None,
    target: Target | None = None,
) -> Extraction:
    """The best adapters of that rank for the difference of two models: its truncated SVD, weight by weight.

    Biases, norms and whatever else is no matrix stay the base's. A weight that is tied in both models is decomposed
    once, and every layer that has it gets the adapter; where it is tied in one model only, each layer gets its own
    change.

    Args:
        base: the model before.
        tuned: the same architecture after; neither is changed.
        rank: an integer or a rule for every weight.
        energy: instead of a rank: the part of the squared change to keep, in (0, 1].
        target: which weights, as in :func:`add_lora_`; by default all that changed.

    Raises:
        LowRankError: if the models differ in their weights' names or shapes, or nothing changed.
    """
    check_model(base)
    check_model(tuned)
    if (rank is None) == (energy is None):
        raise LowRankError("extract_lora: expected either rank= or energy=.")
    rule: Rank = Energy(energy) if energy is not None else rank  # type: ignore[assignment]
    found = Extraction()
    known: dict[tuple[object, object], tuple[Kind, Extracted]] = {}
    for place in targets(base, target if target is not None else lambda *_: True):
        key = place.name
        weight, other = tensor_for(base, place), tensor_for(tuned, place)
        if weight is None or other is None or weight.shape != other.shape:
            raise LowRankError(f"extract_lora: {key!r} is not in both models with one shape; give two of one kind.")
        change = other.to(weight.device).double() - weight.double()
        if not bool(torch.isfinite(change).all()):
            raise LowRankError(
                f"extract_lora: the change of {key!r} has NaN or Inf entries; there is nothing to extract."
            )
        if not bool(change.any()):
            continue
        kind = place.layout
        pair = _identity(place), _identity(replace(place, module=tuned.get_submodule(place.owner)))
        if pair not in known or not isinstance(kind, Matrix):
            known[pair] = kind, _extract(weight, change, kind, rule, key)
        found[place.owner, place.parameter] = _in_kind(kind, *known[pair])
    if not found:
        raise LowRankError("extract_lora: the two models have the same weights; there is nothing to extract.")
    return found


def _checked(model: nn.Module, owner: str, parameter: str, found: Extracted, name: str) -> AdaptedWeight:
    """The weight of a model that an extracted change belongs to, which must fit."""
    label = f"{owner}.{parameter}" if owner else parameter
    try:
        weight = AdaptedWeight(owner, parameter, model.get_submodule(owner))
        old = weight.base.shape
    except AttributeError:
        raise LowRankError(
            f"Extraction.apply_: the model has no {label!r}; give the base, or another of its kind."
        ) from None
    check_adaptable(weight, name)
    new = weight.layout.product(found.a.to("meta"), found.b.to("meta")).shape
    if new != old:
        raise LowRankError(
            f"Extraction.apply_: {label!r} has shape {tuple(old)}, expected {tuple(new)}, as in the base."
        )
    return weight


def _identity(weight: AdaptedWeight) -> object:
    """Equal for all weights that are the same parameter, and for no others."""
    parameter = weight.module._parameters.get(weight.parameter)
    return (weight.owner, weight.parameter) if parameter is None else id(parameter)


def _in_kind(kind: Kind, first_kind: Kind, first: Extracted) -> Extracted:
    """The same change in another layer: an embedding holds the transpose of the linear layer that is tied to it."""
    if kind == first_kind:
        return first
    return replace(first, a=first.b.mT.contiguous(), b=first.a.mT.contiguous())


def _extract(weight: Tensor, change: Tensor, kind: Kind, rule: Rank, key: str) -> Extracted:
    stack = kind.matrix(change)
    stack = stack if stack.ndim == 3 else stack[None]
    parts = [svd(matrix) for matrix in stack]
    values = torch.stack([part.s for part in parts]).square().mean(0).sqrt()
    rows, columns = stack.shape[1:]
    step = rows + columns
    spectrum = Spectrum(values, (rows, columns), range(step, step * len(values) + 1, step), rows * columns, key)
    rank = choose_rank(rule, spectrum, len(values))
    pairs = [part.truncate(rank).pair() for part in parts]
    b, a = (torch.stack(side) for side in zip(*pairs, strict=True))
    a, b = kind.pair(weight, a, b)
    kept = float(values[:rank].square().sum() / values.square().sum())
    size = float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(weight.double()).clamp_min(1e-300))
    a, b = (side.contiguous().to(weight.device, adapter_dtype(weight)) for side in (a, b))
    return Extracted(a, b, rank, kept, size)
