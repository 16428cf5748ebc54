"""The rank of every gradient: given, or found by a rule in the first averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import LowRankError
from ..linalg import scaled_to_unit
from ..rank import Budget, Rank, Spectrum, allocate, check_rank, choose_rank
from .collectives import Mean
from .exchange import bytes_on_wire
from .matrices import matrices_of, matrix_shape

WHO = "LowRankCommState"


@dataclass(frozen=True)
class Look:
    """What a gradient is like, and the ranks that are worth considering.

    Args:
        numbers: in it.
        spectrum: of a matrix, with a stack's added up; ``None`` of what goes whole.
        ranks: the last one, 0, is the whole gradient.
        costs: bytes a step at each of them.
    """

    numbers: int
    spectrum: Spectrum | None
    ranks: list[int]
    costs: list[int]

    def losses(self) -> list[float]:
        """The squared error at each rank."""
        if self.spectrum is None:
            return [0.0]
        energy = self.spectrum.require_values("Budget").square()
        # summed from the small end, which loses nothing
        tail = [*energy.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        return [tail[rank] for rank in self.ranks[:-1]] + [0.0]


class Ranks:
    """Ranks by name.

    Args:
        rule: an integer, a rule for each gradient by itself, or ``Budget(bytes=)`` of a step for all together.
        wire: dtype on the wire.
        a_step: factors that are sent of two.
        saving: of :class:`LowRankCommState`.

    Attributes:
        chosen: what a rule has found; 0 sends the whole gradient.
        spent: the bytes of a step that each has of the budget.
    """

    def __init__(self, rule: Rank | Budget, wire: torch.dtype | None, a_step: int, saving: float) -> None:
        if isinstance(rule, Budget):
            if rule.bytes is None:
                raise LowRankError(f"{WHO}: got {rule}, expected the bytes of a step, as in Budget(bytes=100_000).")
            if rule.of != "model":
                raise LowRankError(f"{WHO}: got {rule}, expected one without of=: it counts all dense gradients.")
        else:
            check_rank(rule, WHO)
        self.rule, self.saving = rule, saving
        self.fixed = rule if isinstance(rule, int) else None
        self.chosen: dict[str, int] = {}
        self.spent: dict[str, int] = {}
        self._a_step, self._wire = a_step, wire
        self._seen: dict[str, Look] = {}
        self._spoiled = False  # by what is not finite

    def of(self, name: str, shape: tuple[int, int, int]) -> int | None:
        """The rank of a gradient; ``None`` where it is sent whole, or not known yet."""
        rank = min(self.chosen.get(name, 0) if self.fixed is None else self.fixed, *shape[1:])
        return rank if rank and self._saves(rank, shape[1:]) else None

    def known(self, named: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether there is nothing to be found out about these."""
        return self.fixed is not None or all(self._is_known(name, gradient) for name, gradient in named)

    def complete(self, names: Iterable[str], all_names: Iterable[str]) -> bool:
        """Whether all have been looked at after these."""
        return set(all_names) <= {*names, *self._seen, *self.chosen}

    def look(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """At averaged gradients; where one is not finite, again in the next step."""
        for name, gradient in named:
            if self._is_known(name, gradient):
                continue
            shape = matrix_shape(gradient.shape)
            whole = bytes_on_wire(gradient.numel(), self._wire, factor=False)
            if shape is None:
                self._seen[name] = Look(gradient.numel(), None, [0], [whole])
                continue
            matrix = matrices_of(gradient.detach().float())
            if not bool(torch.isfinite(matrix).all()):
                self._spoiled = True
                break
            # in fp64 the squares of everything that fp32 holds are finite, and none of them vanishes
            matrix, scale = scaled_to_unit(matrix)
            values = (torch.linalg.svdvals(matrix).double() * scale).square().sum(0).sqrt()
            numbers = shape[0] * sum(shape[1:])
            sizes = range(numbers, numbers * len(values) + 1, numbers)
            spectrum = Spectrum(values, shape[1:], sizes, gradient.numel(), f"{WHO}, {name!r}")
            ranks = [rank for rank in range(1, len(values) + 1) if self._saves(rank, shape[1:])]
            # beside every matrix goes a flag
            costs = [self._cost(rank, shape) + bytes_on_wire(1, None) for rank in ranks]
            self._seen[name] = Look(gradient.numel(), spectrum, [*ranks, 0], [*costs, whole])

    def settle(self, mean: Mean, device: torch.device, *, last: bool) -> None:
        """Chooses for what was looked at; the first process decides. A budget waits for the ``last`` ones of a step."""
        if not (self._seen or self._spoiled) or (isinstance(self.rule, Budget) and not last):
            return
        seen, spoiled = self._seen, self._spoiled
        self._seen, self._spoiled = {}, False
        if spoiled:
            return
        found = self._spend(self.rule, seen) if isinstance(self.rule, Budget) else self._each(self.rule, seen)
        ranks = torch.tensor(list(found.values()), device=device)
        mean.agree_(ranks)
        self.chosen |= dict(zip(found, ranks.tolist(), strict=True))
        if isinstance(self.rule, Budget):
            costs = {name: dict(zip(look.ranks, look.costs, strict=True)) for name, look in seen.items()}
            self.spent |= {name: costs[name][self.chosen[name]] for name in seen}

    def _each(self, rule: Rank, seen: Mapping[str, Look]) -> dict[str, int]:
        found = {}
        for name, look in seen.items():
            found[name] = 0
            if look.spectrum is not None:
                values = look.spectrum.require_values(rule)
                found[name] = choose_rank(rule, look.spectrum, len(values)) if bool(values.any()) else 1
        return found

    def _spend(self, budget: Budget, seen: Mapping[str, Look]) -> dict[str, int]:
        """The least error of all together that the bytes of a step allow."""
        looks = list(seen.values())
        # a number of bytes is spent once, also where a layer is unfrozen later; a fraction is of each
        before = sum(self.spent.values()) if isinstance(budget.bytes, int) else 0
        left = budget.limit(Cost(bytes=4 * sum(look.numbers for look in looks))) - before
        picks = allocate([look.costs for look in looks], [look.losses() for look in looks], left)
        return {name: look.ranks[pick] for (name, look), pick in zip(seen.items(), picks, strict=True)}

    def _is_known(self, name: str, gradient: Tensor) -> bool:
        return name in self.chosen or (gradient.ndim < 2 and not isinstance(self.rule, Budget))

    def _cost(self, rank: int, shape: tuple[int, int, int]) -> int:
        return sum(bytes_on_wire(shape[0] * rank * side, self._wire) for side in shape[1:]) * self._a_step // 2

    def _saves(self, rank: int, shape: tuple[int, int]) -> bool:
        return self.saving * rank * sum(shape) < shape[0] * shape[1]
