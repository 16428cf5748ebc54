"""Fewer hidden units: the layers that make them and the one that reads them become smaller together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibrate import forward, quiet_eval
from ...calibrate.example import has_tokens, map_tensors
from ...calibrate.staged_calibration import without_cache
from ...calibrate.statistics import Statistics
from ...errors import LowRankError
from ..hidden_units.find import find_hidden_units
from ..hidden_units.group import UnitGroup

POSITIONS = 16
"""So many tokens are enough to see which layer reads which."""


@dataclass(frozen=True)
class HiddenUnitsMethod:
    """Removes hidden units of perceptrons, gated or not, and inner channels of convolutions, as a method of a plan.

    Hidden units are the outputs of a layer, or of two that gate each other, that one other layer reads and nothing
    else. Which ones go is found as in :func:`remove_units_`; the layer that reads them makes up for them. All layers
    beside them become smaller and stay ordinary layers. In a plan the method competes with those for single layers: the
    layers beside the units take either it or methods of their own.

    It is on request, and needs statistics: ``methods=[*lr.METHODS.values(), lr.HiddenUnitsMethod()]``. It is none of
    ``METHODS``, whose members take one layer. With ``make_plan(uniform=True)`` layers that are alike keep one size.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(100, 16)]
        >>> stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5), stats, [lr.SVDMethod(), lr.HiddenUnitsMethod()])
        >>> plan["0"].method, plan["0"].rank, plan["2"].rank
        ('hidden_units', 31, 31)
        >>> lr.factorize_(model, plan, stats)
        Sequential(
          (0): Linear(in_features=16, out_features=31, bias=True)
          (1): ReLU()
          (2): Linear(in_features=31, out_features=4, bias=True)
        )
    """

    name: ClassVar[str] = "hidden_units"

    def find(self, model: nn.Module, stats: Statistics) -> list[UnitGroup]:
        """Returns the groups of a model, in forward order.

        Args:
            model: the dense model; it is as before afterwards.
            stats: its statistics, on whose example it is run.
        """
        if stats.example is None:
            raise LowRankError(
                "make_plan: got statistics without an example, on which HiddenUnitsMethod runs the model to find hidden"
                " units; expected those of calibrate, whose batches hold tensors alone."
            )
        parameter = next(model.parameters())
        batch = map_tensors(lambda tensor: tensor.to(parameter.device), stats.example)
        with quiet_eval(model), without_cache(model):
            batch = _shortened(model, batch, with_target=stats.with_target)
            found = find_hidden_units(model, batch, with_target=stats.with_target)
        return [UnitGroup(each.producers, each.norms, each.consumer, each.count) for each in found]

    def read(self, settings: Mapping[str, Any]) -> UnitGroup:
        """Returns the group that a plan's file holds.

        Args:
            settings: what its ``settings`` returned.
        """
        try:
            group = UnitGroup(**settings)
            names = (*group.layers, "")
            is_good = isinstance(group.count, int) and group.count > 1 and all(isinstance(each, str) for each in names)
        except TypeError:
            is_good = False
        if not is_good:
            raise LowRankError(
                f"the method 'hidden_units' does not take the settings {dict(settings)!r}, expected producers, norms,"
                " consumer and count; plan anew."
            )
        return group


@torch.no_grad()
def _shortened(model: nn.Module, batch: Any, *, with_target: bool) -> Any:
    """The first positions of a batch of tokens, where the model runs on them; another batch as it is."""
    shapes: set[tuple[int, ...]] = set()

    def look(tensor: Tensor) -> Tensor:
        shapes.add(tuple(tensor.shape))
        return tensor

    map_tensors(look, batch)
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[1] <= POSITIONS or not has_tokens(batch, with_target=with_target):
        return batch
    few = map_tensors(lambda tensor: tensor[:, :POSITIONS], batch)
    try:
        forward(model, few, with_target=with_target)
    except Exception:  # a model of sequences of one length
        return batch
    return few
