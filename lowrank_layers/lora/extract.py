"""What a fine-tune changed, as adapters of the base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decompose import svd
from ..errors import LowRankError
from ..rank import Energy, Rank, Spectrum, choose_rank
from ..walk import check_model
from .adapter import Adapter
from .inject import attach_, freeze_
from .kinds import Kind, kind_of
from .target import Place, Target, targets


@dataclass(frozen=True)
class Extracted:
    """The change of one weight at low rank.

    Args:
        a: ``A``.
        b: ``B``.
        energy: how much of the squared change they hold, in [0, 1].
        change: the change's norm relative to the weight's.
    """

    a: Tensor
    b: Tensor
    energy: float
    change: float


class Extraction(dict[Place, Extracted]):
    """What :func:`extract_lora` found: prints as a table, and becomes adapters of the base.

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
        """Adds them to the base as an adapter of that name, in place; returns the model."""
        check_model(model)
        made = {place: kind_of(model.get_submodule(place[0]), place[1]) for place in self}
        freeze_(model)
        for (owner, parameter), kind in made.items():
            found = self[owner, parameter]
            attach_(model.get_submodule(owner), parameter, name, Adapter(found.a, found.b, scaling=1.0), kind)
        return model

    def __str__(self) -> str:
        rows = [("weight", "rank", "change", "energy kept")]
        for (owner, parameter), found in self.items():
            rank = found.a.shape[-2] if found.a.ndim == 2 else found.b.shape[1]
            rows.append((f"{owner}.{parameter}", str(rank), f"{found.change:.2%}", f"{found.energy:.1%}"))
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

    Biases, norms and whatever else is no matrix stay the base's.

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
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for place in targets(base, target if target is not None else lambda *_: True):
        key = ".".join(filter(None, place))
        if key not in theirs or ours[key].shape != theirs[key].shape:
            raise LowRankError(f"extract_lora: {key!r} is not in both models with one shape; give two of one kind.")
        weight, change = ours[key].detach(), (theirs[key].detach().double() - ours[key].detach().double())
        kind = kind_of(base.get_submodule(place[0]), place[1])
        if bool(change.any()):
            found[place] = _extract(weight, change, kind, rule, key)
    if not found:
        raise LowRankError("extract_lora: the two models have the same weights; there is nothing to extract.")
    return found


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
    return Extracted(a.contiguous().to(weight), b.contiguous().to(weight), kept, size)
