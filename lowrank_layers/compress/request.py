"""The arguments of make_plan: checked, and those that concern single layers as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..calibrate.statistics import LayerStats, Statistics
from ..errors import BudgetError, LowRankError
from ..layers import linear_shape
from ..modules import walk_layers
from ..rank import Budget, Rank, as_budget
from .candidates import Candidate
from .cost_model import CostModel, CountedCost
from .damping import Damping
from .group_method import GroupMethod
from .int8 import check_bits
from .method import Method
from .methods.svd import SVDMethod
from .registry import GROUP_METHODS, check_registered, is_group_method, usual_methods
from .units import Units


@dataclass(frozen=True)
class Request:
    """The methods that compete for the layers of a plan, and how layers are weighted and priced.

    Args:
        methods: the methods of single layers, in order of preference where one rank or rule is given.
        stats: the result of :func:`calibrate`, if there is one.
        damping: ridges on the moments in the statistics.
        cost_model: prices layers and options.
        round_to: ranks are multiples of it.
        groups: the methods over several layers.
    """

    methods: tuple[Method, ...]
    stats: Statistics | None
    damping: Damping
    cost_model: CostModel
    round_to: int = 1
    groups: tuple[GroupMethod, ...] = ()

    def candidate(self, module: nn.Module, stats: LayerStats | None, *, idle: bool = False) -> Candidate:
        """A layer of the model, as methods see it."""
        return Candidate(
            module, stats, damping=self.damping, cost_model=self.cost_model, idle=idle, round_to=self.round_to
        )


def make_request(
    methods: Sequence[Method | GroupMethod] | None,
    stats: Statistics | None,
    damping: Damping | None,
    cost_model: CostModel | None,
    round_to: int,
    usual_groups: Sequence[GroupMethod] = (),
) -> Request:
    """The arguments of make_plan that concern single layers, checked and with their defaults."""
    if methods is not None and not methods:
        raise LowRankError("make_plan: got no methods; leave methods=None for all of them.")
    if methods is None:
        methods = [*usual_methods(), *usual_groups]
    groups = tuple(cast(GroupMethod, method) for method in methods if is_group_method(method))
    chosen = [check_registered(each) for each in methods if not is_group_method(each)]
    damping = Damping.default(stats) if damping is None else damping
    if not isinstance(damping, Damping):
        raise LowRankError(f"make_plan: got damping={damping!r}, expected a Damping, as in Damping(inputs=1e-3).")
    cost_model = CountedCost() if cost_model is None else cost_model
    if not callable(getattr(cost_model, "cost", None)) or not hasattr(cost_model, "affine"):
        raise LowRankError(f"make_plan: got cost_model={cost_model!r}, expected a CostModel such as CountedCost().")
    return Request(tuple(chosen), stats, damping, cost_model, round_to, groups)


def usual_groups(stats: Statistics | None) -> list[GroupMethod]:
    """The methods over several layers that compete under a budget where none are named.

    Hidden units are removed from models that read tokens, where gradients tell how much each of them matters.

    Args:
        stats: the statistics of the model, if there are any.
    """
    if stats is None or stats.example is None or not stats.reads_tokens:
        return []
    known = [each.gradients is not None for each in stats.values()]
    return [GROUP_METHODS["hidden_units"]] if known and all(known) else []


def methods_of_alds(
    methods: Sequence[Method | GroupMethod] | None, units: Units | None, rank: Rank | None
) -> Sequence[Method | GroupMethod]:
    """The one method whose options have the error that ALDS compares, or an error that names the remedy."""
    if rank is not None or units is not None:
        raise LowRankError("make_plan: got allocation='alds' with rank= or units=, expected a budget alone.")
    chosen: Sequence[Method | GroupMethod] = [SVDMethod()] if methods is None else methods
    if not all(isinstance(method, SVDMethod) for method in chosen):
        raise LowRankError(f"make_plan: got allocation='alds' with methods={chosen!r}, expected [SVDMethod()].")
    return chosen


def methods_of_uniform(
    methods: Sequence[Method | GroupMethod] | None, bits: int | None
) -> Sequence[Method | GroupMethod]:
    """The methods that leave ordinary layers, or an error that names the remedy."""
    chosen = list(GROUP_METHODS.values()) if methods is None else methods
    if bits is not None or not chosen or not all(map(is_group_method, chosen)):
        raise LowRankError(
            f"make_plan: got uniform=True with methods={methods!r} and bits={bits!r}, expected methods over several"
            " layers alone, as in methods=[lr.HiddenUnitsMethod()], and no bits: what others build is no ordinary"
            " layer of one size."
        )
    return chosen


def check_groups(request: Request, budget: Budget | None, timed: bool) -> None:
    """Raises where methods over several layers are asked for and cannot be had."""
    if not request.groups:
        return
    name = request.groups[0]
    if budget is None or timed:
        raise LowRankError(
            f"make_plan: got the method {name!r} with {'rank=' if budget is None else 'a limit on latency'}, expected a"
            " budget of parameters, bytes, MACs or loss; leave the method out."
        )
    if request.stats is None:
        raise LowRankError(
            f"make_plan: got the method {name!r} without statistics, expected stats=calibrate(model, batches): they say"
            " which units others make up for."
        )


def check_budget(budget: Budget, stats: Statistics | None, example: Any) -> Budget:
    """Raises for limits on what is not known, and returns the budget."""
    if budget.latency is not None and example is None and (stats is None or stats.example is None):
        raise BudgetError(
            "a budget of latency needs a batch to run the model on: pass example=batch, or"
            " stats=calibrate(model, batches), whose first sample is taken."
        )
    if budget.macs is not None and stats is None:
        raise BudgetError(
            "a budget of MACs needs to know the sizes of the inputs: pass stats=calibrate(model, batches)."
        )
    if budget.loss is not None and (stats is None or all(each.gradients is None for each in stats.values())):
        raise BudgetError(
            "a limit on the growth of the loss needs gradients of a loss: pass"
            " stats=calibrate(model, batches, loss=SampledCrossEntropy()), or the loss that the model was trained with."
        )
    return budget


def check_int8(bits: int | None, budget: Budget | None, allocation: str) -> None:
    """Raises where weights in int8 are asked for and nothing would choose them, or would do so by wrong numbers."""
    check_bits(bits)
    if bits is None:
        return
    if budget is None or "bytes" not in as_budget(budget).units:
        raise LowRankError(
            f"make_plan: got bits={bits} without a limit on bytes, which is what they save; expected one, as in"
            " Budget(bytes=0.25)."
        )
    if as_budget(budget).latency is not None or allocation == "alds":
        raise LowRankError(
            f"make_plan: got bits={bits} with a limit on latency or allocation='alds', which do not know int8; leave"
            " one of them out."
        )


def check_stats(model: nn.Module, stats: Statistics) -> None:
    """Raises for statistics of another model."""
    layers = dict(walk_layers(model))
    for name, each in stats.items():
        if name not in layers:
            raise LowRankError(f"the statistics know {name!r}, which this model has not; calibrate this model.")
        seen, expected = each.inputs.mean.shape[-1], linear_shape(layers[name])[2]
        if seen != expected:
            raise LowRankError(
                f"{name!r}: got statistics of {seen} inputs for a layer of {expected}; calibrate this model, not"
                " another one."
            )
