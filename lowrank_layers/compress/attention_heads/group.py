"""The heads of all attentions of a model as the group of layers of a plan that loses entries together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...calibrate.statistics import LayerStats, Statistics
from ...errors import LowRankError
from ...layers import bias_of, weight_of
from ...layers.config import Spec
from ...linalg import full_precision
from ..damping import Damping
from ..hidden_units.problem import unit_problem
from ..regression import Metric
from ..short_example import short_example
from .choices import HeadChoices, KeptHeads
from .find import PROJECTIONS, find_attentions
from .losses import read_from
from .sizes import HeadSizes


@dataclass(frozen=True)
class HeadGroup:
    """The projections of all attentions of a model, whose heads have one size; a :class:`LayerGroup`.

    Its units are the entries of a head.

    Args:
        attentions: names of the attentions.
        count: entries of a head.
        context: the largest distance of two tokens that counts in the choice of frequencies.
    """

    attentions: tuple[str, ...]
    count: int
    context: int

    @property
    def layers(self) -> tuple[str, ...]:
        """All projections."""
        return tuple(f"{name}.{key}" for name in self.attentions for key in PROJECTIONS)

    @property
    def planned(self) -> tuple[str, ...]:
        """The layers that single methods compete for, which are all of them."""
        return self.layers

    @property
    def leaders(self) -> tuple[str, ...]:
        """The projections of keys and of outputs: queries and keys lose one product, values what their reader loses."""
        return tuple(f"{name}.{key}" for name in self.attentions for key in ("k_proj", "o_proj"))

    @property
    def step(self) -> int:
        """Entries go in pairs."""
        return 2

    def settings(self) -> dict[str, Any]:
        """Returns the group as a plan's file holds it."""
        return asdict(self)

    def spec_at(self, name: str, spec: Spec, rank: int) -> Spec:
        """Returns the settings of a projection of smaller heads.

        Args:
            name: the projection.
            spec: its settings in the dense model.
            rank: entries of a head.
        """
        side = "in_features" if name.endswith("o_proj") else "out_features"
        return {**spec, side: spec[side] // self.count * rank}

    def shape_at(self, name: str, shape: tuple[int, ...] | None, layer: Spec, rank: int) -> tuple[int, ...] | None:
        """Returns the shape of the input of a projection of smaller heads.

        Args:
            name: the projection.
            shape: that of its input in the dense model, where it is known.
            layer: its settings.
            rank: entries of a head.
        """
        if shape is None or not name.endswith("o_proj"):
            return shape
        return *shape[:-1], shape[-1] // self.count * rank

    def damping(self, damping: Damping) -> Damping:
        """Returns the ridges on the moments of its leaders.

        Args:
            damping: those of the plan.
        """
        return damping

    def check(self, model: nn.Module, stats: Statistics, rank: int) -> None:
        """Raises unless the model can have heads of another size.

        Args:
            model: the dense model; it is as before afterwards.
            stats: its statistics, on whose example it is run.
            rank: entries of a head.

        Raises:
            LowRankError: if it cannot.
        """
        attentions, rotary = find_attentions(model)
        if tuple(each.name for each in attentions) != self.attentions or attentions[0].size != self.count:
            raise LowRankError(
                f"smaller heads: got {len(attentions)} attentions with heads of {attentions[0].size} entries, expected"
                f" {len(self.attentions)} with {self.count} under the names in the plan; it is for another model."
            )
        if rank < self.count:
            example = short_example(model, stats, "AttentionHeadsMethod")
            with torch.no_grad():
                HeadSizes(model, attentions, rotary).check(example, rank, with_target=stats.with_target)

    @full_precision
    @torch.no_grad()
    def choices(self, model: nn.Module, stats: Statistics, damping: Damping) -> HeadChoices:
        """Returns what heads of each size keep, and by how much the loss grows.

        Args:
            model: the dense model.
            stats: its statistics.
            damping: ridges on the moments.
        """
        attentions, rotary = find_attentions(model)
        return HeadChoices(attentions, rotary.frequencies, stats, damping, self.context)

    @full_precision
    @torch.no_grad()
    def reduced(
        self,
        name: str,
        dense: nn.Module,
        stats: LayerStats,
        damping: Damping,
        kept: KeptHeads,
        outputs: Sequence[Metric | None] | None = None,
    ) -> nn.Module:
        """Returns a projection of the old size with what stays of the keys, or that reads what stays of the values.

        Args:
            name: the projection.
            dense: the projection of this name; not changed.
            stats: its statistics, which may be those behind a compressed prefix.
            damping: ridges on the moments.
            kept: what stays.
            outputs: as in :class:`Candidate`.
        """
        attention, _, key = name.rpartition(".")
        maps = kept.maps[attention]
        problem = unit_problem(dense, stats.changed(free_bias=False), damping, outputs)
        if key == "k_proj":
            weight, bias = maps.key_projector @ problem.full, problem.corrected_bias(problem.full)
            bias = None if bias is None else maps.key_projector @ bias
        else:
            heads = problem.weight.shape[1] // (len(maps.values) * self.count)
            weight = read_from(problem, maps.all_values(heads))
            bias = problem.corrected_bias(weight)
        new = copy.deepcopy(dense)
        weight_of(new).copy_(weight)
        if bias is not None and bias_of(new) is not None:
            new.get_parameter("bias").copy_(bias)
        return new

    @full_precision
    @torch.no_grad()
    def cut_(self, model: nn.Module, kept: KeptHeads) -> None:
        """Leaves the attentions of a model with smaller heads, in place, and its configuration with their size.

        Args:
            model: the model, with projections that :meth:`reduced` returned.
            kept: what stays.
        """
        if kept.size < self.count:
            attentions, rotary = find_attentions(model)
            weights = [kept.maps[each.name].cut(each) for each in attentions]
            HeadSizes(model, attentions, rotary).put_(weights, kept.size, kept.frequencies)
