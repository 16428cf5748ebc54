"""The plan that meets a limit on latency, and what the whole model then takes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
TRIALS = 8
"""Choices at most that are timed as whole models."""
CLOSE = 0.03
"""Part of its predicted time by which the whole model may be off."""
REPEATS = 21
"""Timed forward passes of the whole model, dense and compressed by turns."""


@dataclass(frozen=True)
class Trial:
    """A choice whose whole model was timed.

    Args:
        picks: one offer per layer.
        by_layers: seconds that its layers save.
        saved: seconds that the model saves.
    """

    picks: dict[str, Offer]
    by_layers: float
    saved: float


def fit_latency(
    model: nn.Module, problem: Allocation, table: LatencyTable
) -> tuple[Allocation, dict[str, Offer], float]:
    """Chooses one offer per layer under a budget with a limit on latency.

    A choice is made by the times of the table, what it takes is timed, and the choice is made anew, until all that it
    takes has been timed. Then the model is timed whole, beside the dense one. It may save more than its layers do, or
    less: max-pooling on a CPU, say, takes a third of the time on the smooth channels that a layer of low rank returns,
    since the processor guesses right which of two neighbours is greater. Where the model does not take what was
    predicted, the table is corrected by all trials so far, and the choice is made and timed again.

    Args:
        model: the dense model, its attentions closed.
        problem: the offers, without times.
        table: times of its layers.

    Returns:
        The problem with the times that the choice was made by, the choice, and the seconds that were measured.

    Raises:
        BudgetError: if no choice keeps the limits, or what keeps them takes longer than the dense model.
    """
    table.measure_grid(problem.offers)
    tried: list[Trial] = []
    beyond = False
    for _ in range(TRIALS):
        timed, error = _timed(problem, table), None
        try:
            picks = _settled(timed, table)
        except BudgetError as missed:
            if beyond:
                raise
            beyond, error, picks = True, missed, _fastest(timed, table)  # the table may be too pessimistic
        promised = _saved_by_layers(picks, table)
        saved = (1 - time_ratio(model, _compressed(model, problem, picks), table.run)) * table.whole
        if promised <= 0 or saved <= 0:
            if error is not None:
                raise error
            break
        if error is None and abs(saved - promised) <= CLOSE * (table.whole - promised):
            break
        tried.append(Trial(picks, promised / table.gain, saved))
        table.gain = gain_at(max(promised, timed.excess("latency")), tried)
    else:  # the time jumps at the limit: the least choice that keeps it
        kept = min(tried, key=lambda trial: (max(timed.excess("latency") - trial.saved, 0.0), trial.by_layers))
        table.gain, saved = kept.saved / kept.by_layers, kept.saved
        timed, picks = _timed(problem, table), _priced(kept.picks, table)
    if saved < 0 and any(offer.method is not None for offer in picks.values()):
        raise BudgetError(
            f"{problem.budget}: the fastest plan that was found takes {1 - saved / table.whole:.2f} times the time of"
            " the dense model: its layers are too small to gain by low rank on this machine."
        )
    return timed, picks, table.whole - saved


def gain_at(wanted: float, tried: Sequence[Trial]) -> float:
    """Returns what a model that saves so many seconds saves over what its layers save.

    That is taken from the line through the trials that saved just less and just more, of which the dense model is the
    first; beyond the last of them it stays as it was there.

    Args:
        wanted: the seconds that the model is to save.
        tried: the trials so far.
    """
    less = [(trial.by_layers, trial.saved) for trial in tried if trial.saved < wanted]
    more = [(trial.by_layers, trial.saved) for trial in tried if trial.saved >= wanted]
    low, high = max(less, default=(0.0, 0.0)), min(more, default=None)
    if high is None:
        return low[1] / low[0]
    by_layers = low[0] + (high[0] - low[0]) * (wanted - low[1]) / (high[1] - low[1])
    return wanted / by_layers


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


def _fastest(problem: Allocation, table: LatencyTable) -> dict[str, Offer]:
    """The offer of least time for each layer."""
    picks = {name: min(each, key=lambda offer: offer.option.cost.latency) for name, each in problem.offers.items()}
    table.measure({name: [offer] for name, offer in picks.items()})
    return _priced(picks, table)


def _priced(picks: dict[str, Offer], table: LatencyTable) -> dict[str, Offer]:
    """A choice, all of which was timed, with the times of the table as it is now."""
    return {name: table.priced({name: [offer]})[name][0] for name, offer in picks.items()}


def _saved_by_layers(picks: dict[str, Offer], table: LatencyTable) -> float:
    return sum(table.seconds(name) - offer.option.cost.latency for name, offer in picks.items())


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
