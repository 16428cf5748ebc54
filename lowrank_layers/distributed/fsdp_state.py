"""What a low-rank reduction over replicas of shards knows, and does in each backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import LowRankError
from .fsdp_private import Unit
from .powersgd import LowRankCommState


class LowRankReduceState(LowRankCommState):
    """Averages shards of gradients over replicas at low rank; made by :func:`attach_low_rank_reduce`.

    Args:
        units: of the model.
        settings: see :class:`LowRankCommState`. Ranks, warm starts and errors are those of this process' shards, under
            names such as ``head.weight:shard0``.
    """

    def __init__(self, units: Sequence[Unit], **settings: Any) -> None:
        super().__init__(**settings)
        self.units = list(units)
        self._steps: dict[str, int] = {}
        self._start = self._counted = self.step
        self._held: dict[str, dict[str, Tensor]] = {}

    def submit(self, bucket: object) -> NoReturn:
        """DDP's way in: not for this one."""
        raise LowRankError("low_rank_hook: got the state of attach_low_rank_reduce, expected a LowRankCommState.")

    @torch.no_grad()
    def reduce_(self, unit: Unit, flat: Tensor) -> None:
        """Averages what FSDP2 has reduced and scattered, in place, before it returns."""
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
        step = self._next_step(unit)
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        trained = [name for name, shard in self._parameters().items() if shard.requires_grad]
        last = self.ranks.complete([name for name, _ in named], trained)
        compress = step >= self.start_step
        self._reduce(flat, named, step, scale, compress=compress)
        if compress:
            self.ranks.settle(self.mean, flat.device, last=last)

    def _parameters(self) -> dict[str, Tensor]:
        """What there may be something to remember of."""
        pairs = [(unit.tags()[name], shard) for unit in self.units for name, shard in unit.parameters().items()]
        return {tag: shard for tag, shard in pairs if shard.numel()}

    def _next_step(self, unit: Unit) -> int:
        """Each unit counts its own: one may be skipped, or be reduced twice in a backward."""
        if self.step != self._counted:  # somebody has loaded another
            self._steps, self._start = {}, self.step
        step = self._steps.get(unit.name, self._start)
        self._steps[unit.name] = step + 1
        self.step = self._counted = max(self.step, step + 1)
        return step
