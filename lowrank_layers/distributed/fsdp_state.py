"""The state of low-rank averaging between replicas of an FSDP2 model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .collectives import Collectives
from .fsdp_private import FSDPUnit
from .reducer import LowRankReducer, Step
from .settings import PowerSGDSettings


class LowRankReduceState(LowRankReducer):
    """Averages shards of gradients over replicas at low rank; made by :func:`attach_low_rank_reduce`.

    Ranks, directions and errors are those of this process's shards, under names such as ``head.weight:shard0``.

    Args:
        units: the units of the model.
        settings: how gradients are averaged.
        collectives: the processes that hold the same shards.
        model: the model.
        scaler: a ``GradScaler``, whose changes of scale the errors follow.
    """

    def __init__(
        self,
        units: Sequence[FSDPUnit],
        settings: PowerSGDSettings,
        collectives: Collectives,
        model: nn.Module,
        scaler: Any = None,
    ) -> None:
        super().__init__(settings, collectives, model, scaler)
        self.units = list(units)
        self._steps: dict[str, int] = {}  # of each unit, by its name
        self._start = self._counted = self.step
        self._held: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def reduce_(self, unit: FSDPUnit, flat: Tensor) -> None:
        """Averages the gradients of a unit in place, after FSDP2's reduce-scatter.

        Args:
            unit: the unit.
            flat: its gradients' shards, as FSDP2 packs them.

        Raises:
            LowRankError: where an accumulated gradient has none in the backward that averages.
        """
        named = unit.gradients(flat)
        held = self._held.setdefault(unit.name, {})
        if not unit.all_reduces:
            for name, gradient in named:
                held[name] = held[name].add_(gradient) if name in held else gradient.clone()
            flat.zero_()
            return
        for name, gradient in named:
            if name in held:
                gradient.add_(held.pop(name))
        if held:
            raise LowRankError(
                f"attach_low_rank_reduce: {next(iter(held))!r} had a gradient under set_requires_all_reduce(False), "
                "and has none in the backward that averages; use it there, or average in every backward."
            )
        number = self._next_step(unit)
        trained = [name for name, shard in self._parameters().items() if shard.requires_grad]
        last = self._ranks.complete([name for name, _ in named], trained)
        step = Step(number, self._loss_scale(), compress=number >= self.settings.start_step)
        self._average(flat, named, step)
        if step.compress:
            self._ranks.choose(self.collectives, flat.device, last=last)

    def _parameters(self) -> dict[str, Tensor]:
        """The shards of this process that have elements, by name."""
        pairs = [(unit.tags()[name], shard) for unit in self.units for name, shard in unit.parameters().items()]
        return {tag: shard for tag, shard in pairs if shard.numel()}

    def _next_step(self, unit: FSDPUnit) -> int:
        """Counts the steps of each unit by itself: one may be skipped, or be reduced twice in a backward."""
        if self.step != self._counted:  # another state was loaded
            self._steps, self._start = {}, self.step
        step = self._steps.get(unit.name, self._start)
        self._steps[unit.name] = step + 1
        self.step = self._counted = max(self.step, step + 1)
        return step
