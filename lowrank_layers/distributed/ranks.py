"""The rank of every gradient: given, or found by a rule in the first averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..cost import Cost
from ..errors import LowRankError
from ..rank import Budget, Rank, Spectrum, allocate, check_rank, choose_rank
from .collectives import Mean
from .matrices import matrices_of, matrix_shape
from .wire import bytes_on_wire

WHO = "LowRankCommState"


class Ranks:
    """Ranks by name.

    Args:
        rule: an integer, a rule for each gradient by itself, or ``Budget(bytes=)`` of a step for all together.
        wire: dtype on the wire.
        a_step: factors that are sent of two.
        saving: of :class:`LowRankCommState`.
    """

    def __init__(self, rule: Rank | Budget, wire: torch.dtype | None, a_step: int, saving: float) -> None:
        if isinstance(rule, Budget):
            if rule.bytes is None:
                raise LowRankError(f"{WHO}: got {rule}, expected the bytes of a step, as in Budget(bytes=100_000).")
        else:
            check_rank(rule, WHO)
        self.rule, self.saving = rule, saving
        self.fixed = rule if isinstance(rule, int) else None
        self.chosen: dict[str, int] = {}
        self._a_step, self._wire = a_step, wire
        self._spoiled = False  # by what is not finite
        self._used: dict[str, int] = {}
        self._seen: dict[str, tuple[Spectrum, int] | int] = {}

    def of(self, name: str, shape: tuple[int, int, int]) -> int | None:
        """The rank of a gradient; ``None`` where it is sent whole, or not known yet."""
        rank = self.chosen.get(name) if self.fixed is None else self.fixed
        if rank is None:
            return None
        rank = min(rank, *shape[1:])
        return rank if self._saves(rank, shape[1:]) else None

    def known(self, named: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether there is nothing to be found out about these."""
        return self.fixed is not None or all(name in self.chosen or g.ndim < 2 for name, g in named)

    def complete(self, names: Iterable[str], all_names: Iterable[str]) -> bool:
        """Whether all have been looked at after these."""
        return set(all_names) <= {*names, *self._seen, *self.chosen, *self._used}

    def look(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """At averaged gradients; where one is not finite, again in the next step."""
        for name, gradient in named:
            if name in self.chosen or name in self._used:
                continue
            shape = matrix_shape(gradient.shape)
            if shape is None:
                self._seen[name] = gradient.numel()
                continue
            matrix = matrices_of(gradient.detach().float())
            if not bool(torch.isfinite(matrix).all()):
                self._spoiled = True
                break
            values = torch.linalg.svdvals(matrix).square().mean(0).sqrt()
            step = sum(shape[1:])
            sizes = range(step, step * len(values) + 1, step)
            spectrum = Spectrum(values, shape[1:], sizes, shape[1] * shape[2], f"{WHO}, {name!r}")
            self._seen[name] = spectrum, shape[0]

    def settle(self, mean: Mean, device: torch.device, *, last: bool) -> None:
        """Chooses for what was looked at; the first process decides. A budget waits for the ``last`` ones of a step."""
        if isinstance(self.rule, Budget) and not last:
            return
        if self._spoiled:
            self._seen, self._spoiled = {}, False
            return
        found = self._spent() if isinstance(self.rule, Budget) else self._each(self.rule)
        self._seen = {}
        if found:
            ranks = torch.tensor(list(found.values()), device=device)
            mean.agree_(ranks)
            self.chosen |= dict(zip(found, ranks.tolist(), strict=True))

    def _each(self, rule: Rank) -> dict[str, int]:
        found = {}
        for name, seen in self._seen.items():
            if not isinstance(seen, int):
                values = seen[0].require_values(rule)
                found[name] = choose_rank(rule, seen[0], len(values)) if bool(values.any()) else 1
        return found

    def _spent(self) -> dict[str, int]:
        """The least error of all gradients together that the bytes of a step allow."""
        assert isinstance(self.rule, Budget)
        matrices = {name: seen for name, seen in self._seen.items() if not isinstance(seen, int)}
        vectors = {name: seen for name, seen in self._seen.items() if isinstance(seen, int)}
        numbers = sum(vectors.values()) + sum(stack * spectrum.dense for spectrum, stack in matrices.values())
        flag = bytes_on_wire(1, None)  # beside every matrix
        left = self.rule.limit(Cost(bytes=4 * numbers)) - flag * len(matrices)
        # a number of bytes is spent once, also where a layer is unfrozen later; a fraction is of each
        before = sum(self._used.values()) if isinstance(self.rule.bytes, int) else 0
        whole = {name: bytes_on_wire(count, self._wire, factor=False) for name, count in vectors.items()}
        left -= before + sum(whole.values())
        costs, losses = [], []
        for spectrum, stack in matrices.values():
            energy = stack * spectrum.require_values(self.rule).square()
            tail = (energy.sum() - energy.cumsum(0)).clamp_min(0.0).tolist()
            ranks = [rank for rank in range(1, len(energy) + 1) if self._saves(rank, spectrum.shape)]
            each = [[bytes_on_wire(stack * rank * side, self._wire) for side in spectrum.shape] for rank in ranks]
            costs.append([sum(pair) * self._a_step // 2 for pair in each])
            losses.append([tail[rank - 1] for rank in ranks])
            costs[-1].append(bytes_on_wire(stack * spectrum.dense, self._wire, factor=False))
            losses[-1].append(0.0)
        picks = allocate(costs, losses, left)
        self._used |= whole | {name: each[pick] + flag for name, each, pick in zip(matrices, costs, picks, strict=True)}
        # the last option is the whole gradient, and of full rank nothing is saved
        return {
            name: pick + 1 if pick + 1 < len(each) else min(spectrum.shape)
            for (name, (spectrum, _)), pick, each in zip(matrices.items(), picks, costs, strict=True)
        }

    def _saves(self, rank: int, shape: tuple[int, int]) -> bool:
        return self.saving * rank * sum(shape) < shape[0] * shape[1]
