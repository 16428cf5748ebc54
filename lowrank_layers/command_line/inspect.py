"""``lowrank inspect``: what is in a checkpoint, which layers are worth factorizing, and what budgets would cost."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from ..checkpoint import Checkpoint
from ..cost import Cost
from ..errors import BudgetError
from ..rank import Budget
from ..rank.energy import RelativeError
from ..spectrum import Advice, Forecast, should_factorize
from ..spectrum.table import percent, shown
from .arguments import add_names, chosen
from .display import print_json, print_table
from .planning import Analysis, analyse, plannable
from .spectrum import numbers

EXAMPLES = """examples:
  lowrank inspect model.safetensors
  lowrank inspect FOLDER --exclude lm_head --error 0.2"""
BUDGETS = (0.75, 0.5, 0.25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("checkpoint", type=Path, help="file or folder of weights")
    parser.add_argument("--error", type=float, default=0.1, help="relative error of a weight to tolerate (default 0.1)")
    add_names(parser)


def run(args: argparse.Namespace) -> None:
    """Prints spectra, advice and forecasts.

    Args:
        args: the arguments.
    """
    RelativeError(args.error)  # refuses what is no error, before the long part
    checkpoint = Checkpoint(args.checkpoint)
    names = chosen(plannable(checkpoint), args)
    found = analyse(checkpoint, names)
    advice = {name: should_factorize(spectrum, error=args.error) for name, spectrum in found.spectra.items()}
    forecasts = {budget: forecast_of(found, budget) for budget in BUDGETS}
    if args.json:
        print_json(_json(found, advice, forecasts))
        return
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in checkpoint.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    print(f"{checkpoint.path}: {found.total.params:,} entries, {found.total.bytes:,} bytes, tensors: {kinds}")
    _print_layers(found, advice, args.error)
    _print_forecasts(forecasts)
    for name, reason in found.skipped.items():
        print(f"{name}: left alone, {reason}")


def forecast_of(found: Analysis, budget: float) -> Forecast | None:
    """Returns what :func:`forecast` predicts without statistics, or ``None`` if the budget cannot be met.

    Args:
        found: the linear layers.
        budget: fraction of all entries of the checkpoint.
    """
    try:
        plan = found.plan(Budget(params=budget))
    except BudgetError:
        return None
    before = sum((entry.before for entry in plan), Cost()).params
    after = sum((entry.after for entry in plan), Cost()).params
    ranks = [spectrum.stable_rank for spectrum in found.spectra.values()]
    return Forecast(plan, 1 - after / before, sum(ranks) / len(ranks), None)


def _print_layers(found: Analysis, advice: dict[str, Advice], error: float) -> None:
    rows = []
    for name, each in found.spectra.items():
        law, advised = each.power_law, advice[name]
        sizes = shown(each.stable_rank), shown(each.effective_rank), shown(None if law is None else law.alpha)
        ranks = each.rank_for_energy(0.9), each.rank_for_energy(0.99), advised.rank, advised.limit
        rows.append((name, "x".join(map(str, each.shape)), *sizes, *map(str, ranks), "yes" if advised else "no"))
    columns = "stable", "effective", "alpha", "90%", "99%"
    head = ("layer", "shape", *columns, f"rank at {error:.0%} error", "smaller up to rank", "factorize?")
    print_table("linear layers", head, rows)


def _print_forecasts(forecasts: dict[float, Forecast | None]) -> None:
    rows = []
    for budget, each in forecasts.items():
        if each is None:
            rows.append((percent(budget), "cannot be reached", "", "", ""))
            continue
        errors = [entry.error or 0.0 for entry in each.plan]
        error = (sum(error**2 for error in errors) / len(errors)) ** 0.5
        size = f"{each.plan.after.params:,}"
        rows.append((percent(budget), size, percent(each.removed), percent(error), shown(each.ratio_times_stable_rank)))
    head = ("budget", "parameters", "removed from linear layers", "error of weights", "removed x stable rank")
    print_table("forecast, without data", head, rows)


def _json(found: Analysis, advice: dict[str, Advice], forecasts: dict[float, Forecast | None]) -> dict[str, object]:
    layers = {
        name: {**numbers(each), "factorize": bool(advice[name]), "advice": advice[name].reason}
        for name, each in found.spectra.items()
    }
    predicted = {
        str(budget): None
        if each is None
        else {
            "params": each.plan.after.params,
            "removed": each.removed,
            "ratio_times_stable_rank": each.ratio_times_stable_rank,
            "ranks": {entry.name: entry.rank for entry in each.plan},
        }
        for budget, each in forecasts.items()
    }
    total = {"params": found.total.params, "bytes": found.total.bytes}
    return {"total": total, "layers": layers, "forecast": predicted, "skipped": found.skipped}
