"""The plan that meets a limit on latency, and what the whole model then takes."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from functools import partial

from torch import nn

from ...errors import BudgetError
from ...linalg import full_precision
from ...modules import replace_
from ..allocation import Allocation, Offer
from ..candidates import Candidate
from ..evaluation.latency import paired_seconds
from ..recovery.objective import device_of
from .run import ExampleRun
from .table import LatencyTable

ROUNDS = 6
"""Choices at most before the times of all that is chosen are measured ones."""
CORRECTIONS = 2
"""Corrections of the table at most by the time of the whole model."""
CLOSE = 0.03
"""Part of its predicted time by which the whole model may be off without a correction."""
REPEATS = 21
"""Timed forward passes of the whole model, dense and compressed by turns."""


def fit_latency(
    model: nn.Module, problem: Allocation, table: LatencyTable
) -> tuple[Allocation, dict[str, Offer], float]:
    """Chooses one offer per layer under a budget with a limit on latency.

    A choice is made by the times of the table, what it takes is timed, and the choice is made anew, until all that it
    takes has been timed. Then the model is timed whole, beside the dense one. Where it does not take what the table
    promised, what it saves over what was promised corrects the table, and the choice is made and timed again.

    Args:
        model: the dense model, its attentions closed.
        problem: the offers, without times.
        table: times of its layers.

    Returns:
        The problem with the times that the last choice was made by, the choice, and the seconds that were measured.
    """
    table.measure_grid(problem.offers)
    for corrections in range(CORRECTIONS + 1):
        timed, missed = _timed(problem, table), None
        try:
            picks = _settled(timed, table)
        except BudgetError as error:
            if corrections:
                raise
            missed, picks = error, _fastest(timed)  # the table may be too pessimistic
        ratio = time_ratio(model, _compressed(model, problem, picks), table.run)
        promised = sum(table.seconds(name) - offer.option.cost.latency for name, offer in picks.items())
        saved = (1 - ratio) * table.whole
        close = abs(saved - promised) <= CLOSE * (table.whole - promised)
        if promised <= 0 or saved <= 0 or (close and missed is None):
            break
        table.gain *= max(saved / promised, 0.1)
    if missed is not None:
        raise missed
    if ratio > 1 and any(offer.method is not None for offer in picks.values()):
        raise BudgetError(
            f"{problem.budget}: the fastest plan that was found takes {ratio:.2f} times the time of the dense model:"
            " its layers are too small to gain by low rank on this machine."
        )
    return timed, picks, ratio * table.whole


def time_ratio(model: nn.Module, small: nn.Module, run: ExampleRun) -> float:
    """Returns the median over pairs of calls of the compressed model's time over the dense one's."""
    with run.ready(model), run.ready(small):
        calls = [partial(run.call, each) for each in (model, small)]
        times = paired_seconds(calls, REPEATS, device_of(model), run.clock_for(model))
    ratio: float = statistics.median(after / before for before, after in zip(*times, strict=True))
    return ratio


def _timed(problem: Allocation, table: LatencyTable) -> Allocation:
    """The problem with times as costs, of offers and of the whole dense model."""
    total = replace(problem.total, latency=table.whole)
    return replace(problem, offers=table.priced(problem.offers), total=total)


def _settled(problem: Allocation, table: LatencyTable) -> dict[str, Offer]:
    """The choice by measured times: what is chosen by interpolated ones is timed before it is chosen again."""
    for _ in range(ROUNDS):
        picks = problem.solve()
        if not table.measure({name: [offer] for name, offer in picks.items()}):
            break
        problem.offers.update(table.priced(problem.offers))
    return picks


def _fastest(problem: Allocation) -> dict[str, Offer]:
    """The offer of least time for each layer."""
    return {name: min(each, key=lambda offer: offer.option.cost.latency) for name, each in problem.offers.items()}


def _compressed(model: nn.Module, problem: Allocation, picks: dict[str, Offer]) -> nn.Module:
    """A copy of the model with the layers that were chosen: the time of a pooling, say, depends on what it is given."""
    small = copy.deepcopy(model)
    replace_(small, {name: _built(problem.layers[name], offer) for name, offer in picks.items() if offer.method})
    return small


@full_precision
def _built(layer: Candidate, offer: Offer) -> nn.Module:
    assert offer.method is not None
    built = offer.method.build(layer, offer.option.rank)
    layer.release()
    return built
