"""Which layers of a model are planned, and why the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ..calibrate.statistics import LayerStats, Statistics
from ..cost import Cost
from ..errors import LowRankError
from ..layers import is_derived, is_factored
from ..modules.replace import reasons_to_stay
from ..modules.tree import walk_layers
from .methods import METHODS, Method, Option, regressions
from .methods.base import repeated_cost

UNREACHED = "smallest rank, since no gradient of the loss reaches it"
"""What the plan says of a layer whose output does not change the loss."""

TRIMMED = 0.01
"""What part of a layer's singular directions may be outliers."""


@dataclass(frozen=True)
class Candidate:
    """One layer in planning.

    Args:
        module: the dense layer.
        stats: its statistics, where the model was calibrated.
        idle: whether the loss does not depend on it, although it depends on other layers.
    """

    module: nn.Module
    stats: LayerStats | None
    idle: bool = False

    @cached_property
    def before(self) -> Cost:
        """Cost of the dense layer."""
        return repeated_cost(self.module, self.stats)

    @cached_property
    def _tails(self) -> list[Tensor]:
        """Estimated growth of the loss at rank 0, 1, 2, ..., group by group."""
        return [problem.tails() for problem in regressions(self.module, self.stats)]

    @property
    def energy(self) -> float:
        """Estimated growth of the loss if nothing of the layer but its output's mean were left."""
        return sum(float(tails[0]) for tails in self._tails)

    @property
    def trimmed_energy(self) -> float:
        """The energy without the largest singular directions: 1 % of them, at least one for each group."""
        return sum(float(tails[max(1, round(TRIMMED * (len(tails) - 1)))]) for tails in self._tails)

    def options(self, methods: Sequence[Method]) -> list[tuple[str, Option]]:
        """Dense first, then everything that any method offers, by the method's name."""
        table = [("dense", Option(None, self.before, 0.0))]
        for method in methods:
            if method.matches(self.module):
                table += [(method.name, option) for option in method.options(self.module, self.stats)]
        return table


def candidates(
    model: nn.Module, methods: Sequence[Method], asked: set[str], stats: Statistics | None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The layers to plan for, and the reason for every other weight of two dimensions or more, both by name.

    Args:
        model: the dense model, its attentions opened.
        methods: those that may be chosen.
        asked: names of the layers that are to be left alone.
        stats: what calibration found.
    """
    reasons = reasons_to_stay(model)
    idle = set() if stats is None else without_gradient(stats)
    found: dict[str, Candidate] = {}
    skipped: dict[str, str] = {}
    for name, module in walk_layers(model):
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if is_factored(module) or isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        if not weights and not is_derived(module):
            continue
        if name in asked:
            skipped[name] = "as asked"
        elif name in reasons:
            skipped[name] = reasons[name]
        elif not any(method.matches(module) for method in methods):
            skipped.update(_unmatched(name, module))
        elif name == "":
            raise LowRankError(
                f"the model itself is a {type(module).__name__} and cannot be replaced in place;"
                " wrap it in nn.Sequential, or use from_dense."
            )
        elif any(p.is_meta for p in weights):
            raise LowRankError(f"{name!r}: its weight is on the meta device; load the weights first.")
        elif stats is not None and (name not in stats or not stats[name].inputs.rows):
            skipped[name] = "calibration never reached it"
        elif name in idle and stats is not None and not stats[name].traced:
            skipped[name] = "it ran without gradients (torch.no_grad), so that its effect on the loss is not known"
        else:
            found[name] = Candidate(module, None if stats is None else stats[name], name in idle)
    return found, skipped


def without_gradient(stats: Statistics) -> set[str]:
    """Layers that no gradient of the loss reached, where it reached others: the loss does not depend on them."""
    reached = {
        name for name, each in stats.items() if each.gradients is not None and bool(each.gradients.count_nonzero())
    }
    return set(stats) - reached if reached else set()


def _unmatched(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and reasons for what no method takes: a layer, or the parameters that a larger module holds itself."""
    kind = type(module).__name__
    known = {"nn.MultiheadAttention", *(cls.dense_name() for method in METHODS.values() for cls in method.layers)}
    parents = [parent for parent in type(module).__mro__ if f"nn.{parent.__name__}" in known]
    if isinstance(module, nn.RNNBase):
        yield name, f"no method for {kind}: torch's recurrent kernels take whole matrices"
    elif isinstance(module, nn.EmbeddingBag):
        yield name, f"no method for {kind} with mode={module.mode!r}"
    elif type(module) is nn.MultiheadAttention:
        yield name, f"{kind} as the model itself cannot be opened in place; wrap it in nn.Sequential"
    elif parents and parents[0] is not type(module):
        yield name, f"no method for {kind}, a subclass of nn.{parents[0].__name__} that may compute something else"
    elif not parents and (name == "" or any(True for _ in module.children())):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                yield f"{name}.{key}" if name else key, f"a parameter of {kind} itself, which no layer holds"
    else:
        yield name, f"no method for {kind}"
