"""Fewer hidden units: the layers that make them and the one that reads them become smaller together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...calibrate import quiet_eval
from ...calibrate.staged_calibration import without_cache
from ...calibrate.statistics import Statistics
from ...errors import LowRankError
from ..hidden_units.find import find_hidden_units
from ..hidden_units.group import UnitGroup
from ..short_example import short_example


@dataclass(frozen=True)
class HiddenUnitsMethod:
    """Removes hidden units of perceptrons, gated or not, and inner channels of convolutions, as a method of a plan.

    Hidden units are the outputs of a layer, or of two that gate each other, that one other layer reads and nothing
    else. Which ones go is found as in :func:`remove_units_`; the layer that reads them makes up for them. All layers
    beside them become smaller and stay ordinary layers. In a plan the method competes with those for single layers: the
    layers beside the units take either it or methods of their own.

    It needs statistics, and competes by default for models that read tokens. For others it is on request:
    ``methods=[*lr.METHODS.values(), lr.HiddenUnitsMethod()]``; it is none of ``METHODS``, whose members take one layer.
    With ``make_plan(uniform=True)`` layers that are alike keep one size.

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
        batch = short_example(model, stats, "HiddenUnitsMethod")
        with quiet_eval(model), without_cache(model):
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
