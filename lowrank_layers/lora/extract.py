"""Extracting the change that fine-tuning made as adapters of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..decompose import svd
from ..errors import LowRankError
from ..modules import check_model
from ..rank import Rank, check_rank, choose_rank, pair_spectrum
from ..rank.energy import Energy
from .adapted_weight import AdaptedWeight
from .adapter import Adapter, adapter_dtype
from .attach import adapting, attach_, check_new_name
from .checks import check_adaptable
from .lookup import tensor_for
from .target import Target, targets
from .weight_layout import Matrix, WeightLayout


@dataclass(frozen=True)
class Extracted:
    """The change of one weight at low rank.

    Args:
        a: ``A``.
        b: ``B``.
        rank: rank of their product; of a stack of matrices, of each.
        energy: fraction of the squared change that they hold, in [0, 1].
        change: norm of the change relative to that of the weight.
    """

    a: Tensor
    b: Tensor
    rank: int
    energy: float
    change: float


class Extraction(dict[tuple[str, str], Extracted]):
    """The low-rank changes that :func:`extract_lora` found, by names of module and parameter.

    Prints as a table, and becomes adapters of the base.

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
        """Adds the changes to the base as an adapter, in place.

        Args:
            model: the base, or another model with the same weights' names and shapes.
            name: name of the adapter.

        Returns:
            The model.

        Raises:
            LowRankError: if the model lacks one of the weights, or has an adapter of that name; nothing changes then.
        """
        check_model(model)
        check_new_name(name, "Extraction.apply_")
        made = {_check_fits(model, key, found, name): found for key, found in self.items()}
        with adapting(model):
            for weight, found in made.items():
                # copies: an extraction may be applied to several models, which are trained apart
                attach_(weight, name, Adapter(found.a.clone(), found.b.clone(), scaling=1.0))
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
    """Extracts the difference of two models as adapters of the first: the truncated SVD of each weight's change.

    Biases, norms and whatever else is no matrix stay as in the base. A weight that is tied in both models is decomposed
    once, and every layer that has it gets the adapter; where it is tied in one model only, each layer gets its own
    change.

    Args:
        base: the model before fine-tuning.
        tuned: the same architecture after fine-tuning; neither is changed.
        rank: rank of every adapter: an integer, or a rank rule.
        energy: fraction of the squared change to keep, in (0, 1], in place of a rank.
        target: which weights, as in :func:`add_lora_`; by default all that changed.

    Raises:
        LowRankError: if the models differ in their weights' names or shapes, or nothing changed.
    """
    check_model(base)
    check_model(tuned)
    if (rank is None) == (energy is None):
        raise LowRankError(f"extract_lora: got rank={rank!r} and energy={energy!r}, expected one of them.")
    rule: Rank = Energy(energy) if energy is not None else rank  # type: ignore[assignment]
    found = Extraction()
    known: dict[tuple[object, object], tuple[WeightLayout, Extracted]] = {}
    for weight in targets(base, target if target is not None else lambda *_: True):
        old, new = weight.values, tensor_for(tuned, weight)
        if new is None or new.shape != old.shape:
            raise LowRankError(
                f"extract_lora: {weight.name!r} is not in both models with one shape; give two of one architecture."
            )
        change = new.to(old.device).double() - old.double()
        if not bool(torch.isfinite(change).all()):
            raise LowRankError(
                f"extract_lora: the change of {weight.name!r} has NaN or Inf entries; there is nothing to extract."
            )
        if not bool(change.any()):
            continue
        layout = weight.layout
        pair = _identity(weight), _identity(replace(weight, module=tuned.get_submodule(weight.owner)))
        if pair not in known or not isinstance(layout, Matrix):
            known[pair] = layout, _extract(weight, change, rule)
        found[weight.owner, weight.parameter] = _in_layout(layout, *known[pair])
    if not found:
        raise LowRankError("extract_lora: the two models have the same weights; there is nothing to extract.")
    return found


def _check_fits(model: nn.Module, key: tuple[str, str], found: Extracted, name: str) -> AdaptedWeight:
    """The weight of a model that an extracted change belongs to, which must fit and have no such adapter."""
    owner, parameter = key
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


def _in_layout(layout: WeightLayout, first_layout: WeightLayout, first: Extracted) -> Extracted:
    """The same change in another layer: an embedding holds the transpose of the linear layer that is tied to it."""
    if layout == first_layout:
        return first
    return replace(first, a=first.b.mT.contiguous(), b=first.a.mT.contiguous())


def _extract(weight: AdaptedWeight, change: Tensor, rule: Rank) -> Extracted:
    """The best approximation of a weight's change, of the rank that a rule gives."""
    check_rank(rule, weight.name)
    values = weight.values
    stack = weight.layout.matrix(change)
    stack = stack if stack.ndim == 3 else stack[None]
    # a rule reads all singular values, a number none: then only as many are computed
    parts = [svd(matrix, rule if isinstance(rule, int) else None) for matrix in stack]
    energies = torch.stack([part.s for part in parts]).square().mean(0)
    rows, columns = stack.shape[1:]
    rank = choose_rank(rule, pair_spectrum(rows, columns, energies.sqrt(), weight.name), len(energies))
    pairs = [part.truncate(rank).pair() for part in parts]
    b, a = (torch.stack(side) for side in zip(*pairs, strict=True))
    a, b = weight.layout.pair(values, a, b)
    a, b = (side.contiguous().to(values.device, adapter_dtype(values)) for side in (a, b))
    size = torch.linalg.vector_norm(change) / torch.linalg.vector_norm(values.double()).clamp_min(1e-300)
    kept = float(energies[:rank].sum() / stack.square().sum((1, 2)).mean())
    return Extracted(a, b, rank, min(kept, 1.0), float(size))
