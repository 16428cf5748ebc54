"""Plans for the linear layers of a checkpoint, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import KEY, Checkpoint, check_is_dense
from ..compress import Candidate, Entry, Plan, make_plan
from ..compress.allocation import Allocation, Offer, offers_for
from ..compress.methods import SVDMethod
from ..compress.units import default_units
from ..cost import Cost
from ..errors import LowRankError
from ..layers import linear_shape
from ..layers.config import Spec
from ..linalg import full_precision
from ..rank import Budget, Rank
from ..spectrum import MatrixSpectrum
from .display import track
from .layers_in_file import forget_values_, linear_layers, read_linear, tree


@dataclass(frozen=True)
class Analysis:
    """The linear layers of a checkpoint, without their values.

    Args:
        layers: the layers by name.
        offers: what each may become.
        spectra: the singular values of their weights.
        skipped: name to reason, for the other layers.
        total: cost of all that is in the checkpoint.
    """

    layers: dict[str, Candidate]
    offers: dict[str, list[Offer]]
    spectra: dict[str, MatrixSpectrum]
    skipped: dict[str, str]
    total: Cost

    def plan(self, budget: Budget) -> Plan:
        """Returns the plan with the least error under a budget, as :func:`make_plan` without statistics.

        Args:
            budget: the limit on the whole checkpoint.
        """
        problem = Allocation(self.layers, self.offers, budget, self.total, default_units(self.layers.values()))
        settings = {
            "budget": budget.to_dict(),
            "limits": problem.limits(),
            "units": problem.units,
            "calibrated": False,
        }
        return Plan(problem.entries(problem.solve()), skipped=self.skipped, total=self.total, settings=settings)


@full_precision
def analyse(checkpoint: Checkpoint, names: Sequence[str]) -> Analysis:
    """Decomposes the weights of linear layers, one after the other.

    Args:
        checkpoint: where they are.
        names: the layers.
    """
    specs, _ = linear_layers(checkpoint)
    layers, offers, spectra = {}, {}, {}
    for name in track(names, "singular values"):
        module = read_linear(checkpoint, name, specs[name])
        layer = Candidate(module)
        _, rows, columns = linear_shape(module)
        spectra[name] = MatrixSpectrum(layer.problems[0].singular_values, (rows, columns))
        offers[name] = offers_for(layer, [SVDMethod()])
        layer.release()
        forget_values_(module)
        layers[name] = layer
    return Analysis(layers, offers, spectra, skipped_layers(checkpoint, names), total_cost(checkpoint))


def plan_by_rule(checkpoint: Checkpoint, names: Sequence[str], rule: Rank) -> Plan:
    """Returns the plan that gives every layer one rank, or the rank by one rule.

    Args:
        checkpoint: where the layers are.
        names: the layers.
        rule: a rank or a rank rule.
    """
    specs, _ = linear_layers(checkpoint)
    entries: list[Entry] = []
    for name in track(names, "ranks"):
        alone = tree({name: read_linear(checkpoint, name, specs[name])})
        entries += make_plan(alone, rank=rule, methods=[SVDMethod()])
    skipped, total = skipped_layers(checkpoint, names), total_cost(checkpoint)
    return Plan(entries, skipped=skipped, total=total, settings={"rank": repr(rule)})


def plannable(checkpoint: Checkpoint) -> dict[str, Spec]:
    """Returns the settings of the linear layers of a checkpoint, by name.

    Args:
        checkpoint: where they are.

    Raises:
        LowRankError: if there is none, or the model is compressed already.
    """
    if KEY in checkpoint.metadata:
        raise LowRankError(f"{checkpoint.path}: was written by lowrank_layers.save, and is factored already.")
    check_is_dense(checkpoint.path)
    specs, _ = linear_layers(checkpoint)
    if not specs:
        raise LowRankError(f"{checkpoint.path}: has no weight of a linear layer; lowrank spectrum shows all weights.")
    return specs


def skipped_layers(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
    """Returns why other layers are left alone, by name.

    Args:
        checkpoint: where they are.
        names: the layers that are not.
    """
    specs, reasons = linear_layers(checkpoint)
    return reasons | {name: "as asked" for name in specs if name not in set(names)}


def total_cost(checkpoint: Checkpoint) -> Cost:
    """Returns the number and the bytes of all entries of a checkpoint.

    Args:
        checkpoint: what is counted.
    """
    infos = checkpoint.values()
    return Cost(params=sum(info.numel for info in infos), bytes=sum(info.nbytes for info in infos))
