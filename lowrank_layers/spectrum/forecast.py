"""What a budget is likely to cost, before anything is factorized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibrate.statistics import Statistics
from ..compress import Plan, make_plan
from ..cost import Cost
from ..rank import Budget
from .table import percent, shown, table
from .weights import weight_spectrum


@dataclass(frozen=True, eq=False)
class Forecast:
    """What :func:`forecast` found; it prints as a table, and ``plot.plan`` draws its plan.

    Args:
        plan: the plan that the numbers are those of.
        removed: fraction of the parameters of the planned layers that the plan removes.
        stable_rank: mean stable rank of the planned layers' weights.
        loss: growth of the loss per sample that the plan predicts; ``None`` without gradients in the statistics.
    """

    plan: Plan
    removed: float
    stable_rank: float
    loss: float | None

    @property
    def ratio_times_stable_rank(self) -> float:
        """The fraction removed times the mean stable rank (Xu, 2026)."""
        return self.removed * self.stable_rank

    def __str__(self) -> str:
        rows = [
            ("parameters", f"{self.plan.total.params:,} -> {self.plan.after.params:,}"),
            ("removed from planned layers", percent(self.removed)),
            ("predicted growth of the loss", "not known" if self.loss is None else shown(self.loss)),
            ("mean stable rank", shown(self.stable_rank)),
            ("removed x mean stable rank", shown(self.ratio_times_stable_rank)),
        ]
        return table(("forecast", ""), rows)


def forecast(model: nn.Module, budget: Budget, stats: Statistics | None = None, **options: Any) -> Forecast:
    r"""Predicts what a budget costs: our estimate of the growth of the loss, beside one from the literature.

    Our estimate is that of the plan, the sum of curvature-weighted errors of all layers. It is quadratic in the errors
    and adds them up, so that it is too low where much is removed; it compares budgets and layers of one model. The
    other one is the fraction of parameters removed times the mean stable rank of the weights, with which the loss of
    accuracy grows over models and ratios (Xu, "Predicting LLM Compression Degradation from Spectral Statistics",
    arXiv 2604.18085). It has no unit, and needs no data.

    Args:
        model: a trained model; it is not changed.
        budget: the limits, as in :func:`make_plan`.
        stats: what :func:`calibrate` returned for it; with a loss, for our estimate.
        **options: keywords of :func:`make_plan`.

    Raises:
        LowRankError: for what :func:`make_plan` refuses.

    Examples:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> stats = lr.calibrate(model, [torch.randn(100, 32)], loss=lr.SampledCrossEntropy())
        >>> half, third = (lr.forecast(model, lr.Budget(params=each), stats) for each in (0.5, 0.33))
        >>> half.loss < third.loss, half.ratio_times_stable_rank < third.ratio_times_stable_rank
        (True, True)
    """
    plan = make_plan(model, budget, stats, **options)
    names = [entry.name for entry in plan]
    spectra = weight_spectrum(model, target=[lambda name, _: name in names])
    before = sum((entry.before for entry in plan), Cost()).params
    after = sum((entry.after for entry in plan), Cost()).params
    known = stats is not None and any(each.gradients is not None for each in stats.values())
    mean = sum(layer.raw.stable_rank for layer in spectra) / len(spectra)
    return Forecast(plan, 1 - after / before, mean, plan.loss if known else None)
