"""Plans for the linear layers of a checkpoint, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint import KEY
from ..compress import Candidate, Entry, Plan, make_plan
from ..compress.allocation import Allocation, Offer, offers_for
from ..compress.methods import SVDMethod
from ..compress.units import default_units
from ..cost import Cost
from ..errors import LowRankError
from ..linalg import full_precision
from ..rank import Budget, Rank
from ..spectrum import MatrixSpectrum
from .checkpoint import Checkpoint
from .display import track
from .layers_in_file import forget_values_, linear_names, owners_of, read_linear, reasons_not_linear, tree


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
    layers, offers, spectra = {}, {}, {}
    for name in track(names, "singular values"):
        module = read_linear(checkpoint, name)
        layer = Candidate(module)
        values = layer.problems[0].singular_values
        spectra[name] = MatrixSpectrum(values, (module.out_features, module.in_features))
        offers[name] = offers_for(layer, [SVDMethod()])
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
    entries: list[Entry] = []
    for name in track(names, "ranks"):
        entries += make_plan(tree({name: read_linear(checkpoint, name)}), rank=rule, methods=[SVDMethod()])
    settings = {"rank": repr(rule)}
    skipped, total = skipped_layers(checkpoint, names), total_cost(checkpoint)
    return Plan(entries, skipped=skipped, total=total, settings=settings)


def linear_layers(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the linear layers of a checkpoint.

    Args:
        checkpoint: where they are.

    Raises:
        LowRankError: if there is none, or the model is factored already.
    """
    if KEY in checkpoint.metadata:
        raise LowRankError(f"{checkpoint.path}: was written by lowrank_layers.save, and is factored already.")
    names = linear_names(owners_of(checkpoint))
    if not names:
        raise LowRankError(f"{checkpoint.path}: has no weight of a linear layer.")
    return names


def skipped_layers(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
    """Returns why other layers are left alone, by name.

    Args:
        checkpoint: where they are.
        names: the layers that are not.
    """
    owners = owners_of(checkpoint)
    left = set(linear_names(owners)) - set(names)
    return reasons_not_linear(owners) | {name: "as asked" for name in owners if name in left}


def total_cost(checkpoint: Checkpoint) -> Cost:
    """Returns the number and the bytes of all entries of a checkpoint.

    Args:
        checkpoint: what is counted.
    """
    infos = checkpoint.values()
    return Cost(params=sum(info.numel for info in infos), bytes=sum(info.nbytes for info in infos))
