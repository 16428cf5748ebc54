"""``lowrank plan``: a rank for every linear layer of a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..checkpoint import Checkpoint
from ..compress import Plan
from ..files import check_writable
from ..rank import Budget
from .arguments import add_names, add_size, chosen, rank_of
from .display import print_json, print_table
from .planning import analyse, plan_by_rule, plannable

EXAMPLES = """examples:
  lowrank plan model.safetensors plan.json --budget 0.5
  lowrank plan FOLDER plan.json --energy 0.9 --exclude lm_head"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("checkpoint", type=Path, help="file or folder of weights")
    parser.add_argument("plan", type=Path, help="the plan to write, as JSON, for lowrank apply or lr.factorize_")
    add_size(parser, "the checkpoint")
    add_names(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the plan, and prints it.

    Args:
        args: the arguments.
    """
    check_writable(args.plan)
    plan = make_plan_of_file(Checkpoint(args.checkpoint), args)
    plan.save(args.plan)
    print_plan(plan, args)


def make_plan_of_file(checkpoint: Checkpoint, args: argparse.Namespace) -> Plan:
    """Returns the plan that the arguments ask for.

    Args:
        checkpoint: what is planned.
        args: arguments with a size and the choice of layers.
    """
    budget = None if args.budget is None else Budget(params=args.budget)
    rule = rank_of(args)
    names = chosen(plannable(checkpoint), args)
    if budget is not None:
        return analyse(checkpoint, names).plan(budget)
    assert rule is not None
    return plan_by_rule(checkpoint, names, rule)


def print_plan(plan: Plan, args: argparse.Namespace) -> None:
    """Prints a plan.

    Args:
        plan: the plan.
        args: the arguments, which say in what form.
    """
    if args.json:
        print_json(json.loads(plan.to_json()))
        return
    rows = []
    for entry in plan:
        error = "" if entry.error is None else f"{entry.error:.1%}"
        sizes = f"{entry.before.params:,}", f"{entry.after.params:,}"
        rows.append((entry.name, entry.method, str(entry.rank or ""), *sizes, error))
    rows.append(("whole checkpoint", "", "", f"{plan.total.params:,}", f"{plan.after.params:,}", ""))
    print_table("plan", ("layer", "method", "rank", "before", "after", "error of the weight"), rows)
    for name, reason in plan.skipped.items():
        print(f"{name}: left alone, {reason}")
