"""The rank of each gradient: given, or chosen by a rule or a budget from the first averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cost import Cost
from ..linalg import scaled_to_unit
from ..rank import Budget, Rank, Spectrum, allocate, choose_rank
from .collectives import Collectives
from .exchange import bytes_on_wire
from .matricize import matricize, matricized_shape
from .settings import PowerSGDSettings


@dataclass(frozen=True)
class RankOptions:
    """The ranks among which a budget or a rule chooses for one gradient.

    Args:
        numel: number of elements of the gradient.
        spectrum: singular values, root-sum-squared over the matrices of a stack; ``None`` for a vector.
        ranks: the options; the last one, 0, stands for the uncompressed gradient.
        costs: bytes per step of each option.
    """

    numel: int
    spectrum: Spectrum | None
    ranks: list[int]
    costs: list[int]

    def losses(self) -> list[float]:
        """The squared error of each option."""
        if self.spectrum is None:
            return [0.0]
        energy = self.spectrum.require_values("Budget").square()
        # summed from the small end, which loses nothing
        tail = [*energy.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        return [tail[rank] for rank in self.ranks[:-1]] + [0.0]


class RankSelection:
    """Ranks by parameter name.

    Args:
        settings: the rank, rule or budget; the dtype on the wire, ``alternate`` and ``saving``.

    Attributes:
        chosen: ranks that a rule or a budget has chosen; 0 stands for an uncompressed gradient.
        spent: bytes per step of each gradient, under a budget.
    """

    def __init__(self, settings: PowerSGDSettings) -> None:
        self.settings, self.rule = settings, settings.rank
        self.fixed = self.rule if isinstance(self.rule, int) else None
        self.chosen: dict[str, int] = {}
        self.spent: dict[str, int] = {}
        self._options: dict[str, RankOptions] = {}
        self._not_finite = False  # whether a gradient could not be observed

    def rank_of(self, name: str, gradient: Tensor) -> int | None:
        """The rank of a gradient; ``None`` where it is sent uncompressed, or not chosen yet."""
        shape = matricized_shape(gradient.shape)
        if shape is None:
            return None
        rank = min(self.chosen.get(name, 0) if self.fixed is None else self.fixed, *shape[1:])
        return rank if rank and self._saves(rank, shape) else None

    def known(self, named: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether the ranks of all these gradients are known."""
        return self.fixed is not None or all(self._is_known(name, gradient) for name, gradient in named)

    def complete(self, names: Iterable[str], all_names: Iterable[str]) -> bool:
        """Whether all gradients are observed once these are."""
        return set(all_names) <= {*names, *self._options, *self.chosen}

    def observe(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Computes the options of averaged gradients; where one is not finite, the next step has to try again."""
        for name, gradient in named:
            if self._is_known(name, gradient):
                continue
            options = self._options_of(name, gradient)
            if options is None:
                self._not_finite = True
                break
            self._options[name] = options

    def choose(self, collectives: Collectives, device: torch.device, *, last: bool) -> None:
        """Chooses the ranks of observed gradients; the first process decides for all.

        Args:
            collectives: the processes.
            device: device for the broadcast.
            last: whether no more gradients follow in this step; a budget waits for that.
        """
        if not (self._options or self._not_finite) or (isinstance(self.rule, Budget) and not last):
            return
        observed, not_finite = self._options, self._not_finite
        self._options, self._not_finite = {}, False
        if not_finite:
            return
        if isinstance(self.rule, Budget):
            found = _by_budget(self.rule, observed, self.spent)
        else:
            found = _by_rule(self.rule, observed)
        ranks = torch.tensor(list(found.values()), device=device)
        collectives.broadcast_(ranks)
        self.chosen |= dict(zip(found, ranks.tolist(), strict=True))
        if isinstance(self.rule, Budget):
            costs = {name: dict(zip(each.ranks, each.costs, strict=True)) for name, each in observed.items()}
            self.spent |= {name: costs[name][self.chosen[name]] for name in observed}

    def _options_of(self, name: str, gradient: Tensor) -> RankOptions | None:
        """The options of a gradient; ``None`` if it is not finite."""
        shape = matricized_shape(gradient.shape)
        uncompressed = bytes_on_wire(gradient.numel(), self.settings.wire, factor=False)
        if shape is None:
            return RankOptions(gradient.numel(), None, [0], [uncompressed])
        matrices = matricize(gradient.detach().float())
        if not bool(torch.isfinite(matrices).all()):
            return None
        # in fp64 the squares of everything that fp32 holds are finite, and none of them vanishes
        matrices, scale = scaled_to_unit(matrices)
        values = (torch.linalg.svdvals(matrices).double() * scale).square().sum(0).sqrt()
        per_rank = shape[0] * sum(shape[1:])
        sizes = range(per_rank, per_rank * len(values) + 1, per_rank)
        spectrum = Spectrum(values, shape[1:], sizes, gradient.numel(), f"PowerSGD, {name!r}")
        ranks = [rank for rank in range(1, len(values) + 1) if self._saves(rank, shape)]
        # with each matrix a flag is sent that says whether it is zero
        costs = [self._cost(rank, shape) + bytes_on_wire(1, None) for rank in ranks]
        return RankOptions(gradient.numel(), spectrum, [*ranks, 0], [*costs, uncompressed])

    def _is_known(self, name: str, gradient: Tensor) -> bool:
        return name in self.chosen or (gradient.ndim < 2 and not isinstance(self.rule, Budget))

    def _cost(self, rank: int, shape: tuple[int, int, int]) -> int:
        both = sum(bytes_on_wire(shape[0] * rank * side, self.settings.wire) for side in shape[1:])
        return both // 2 if self.settings.alternate else both

    def _saves(self, rank: int, shape: tuple[int, int, int]) -> bool:
        return self.settings.saving * rank * sum(shape[1:]) < shape[1] * shape[2]


def _by_rule(rule: Rank, observed: Mapping[str, RankOptions]) -> dict[str, int]:
    """The rank of each gradient by itself."""
    found = {}
    for name, options in observed.items():
        found[name] = 0
        if options.spectrum is not None:
            values = options.spectrum.require_values(rule)
            found[name] = choose_rank(rule, options.spectrum, len(values)) if bool(values.any()) else 1
    return found


def _by_budget(budget: Budget, observed: Mapping[str, RankOptions], spent: Mapping[str, int]) -> dict[str, int]:
    """The ranks with the least total squared error that the bytes per step allow."""
    options = list(observed.values())
    # a count of bytes is spent once, also where a layer is unfrozen later; a fraction is one of the new gradients
    before = sum(spent.values()) if isinstance(budget.bytes, int) else 0
    whole = Cost(bytes=4 * sum(each.numel for each in options))
    left = int(budget.limits(whole)["bytes"]) - before
    picks = allocate([each.costs for each in options], [each.losses() for each in options], left)
    return {name: each.ranks[pick] for (name, each), pick in zip(observed.items(), picks, strict=True)}
