"""The part of benchmarks.language about bytes: ranks, int8, and both under one limit on the bytes of the blocks."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lowrank_layers as lr
from benchmarks.common import markdown_table
from benchmarks.language_scores import measured
from benchmarks.language_texts import Case
from lowrank_layers.files import replacing

INT8 = "int8 alone (full rank)"
ROWS = {"ranks alone": None, "**default: ranks and int8**": 8}
"""The bits that are offered, by row."""

Known = dict[str, dict[str, float]]


def planned(model: Any, stats: lr.Statistics, skip: tuple[str, ...], label: str, size: Any) -> Any:
    """The plan of a row."""
    if label != INT8:
        budget = lr.Budget(bytes=size, of="planned")
        return lr.make_plan(model, budget, stats, skip=skip, bits=ROWS[label])
    plan = lr.make_plan(model, rank=1, stats=stats, methods=[lr.SVDMethod()], skip=skip)
    for entry in list(plan):
        plan.drop(entry.name).set_bits(entry.name, 8)
    return plan


def byte_rows(
    subject: Case,
    args: argparse.Namespace,
    known: Known,
    calibration: Callable[[], tuple[lr.Statistics, list[Any]]],
    skip: tuple[str, ...],
) -> Iterator[str]:
    """Measures the rows that are not known yet, adds them, and says which."""
    wanted: list[tuple[str, str, float | None]] = [(INT8, INT8, None)]
    wanted += [(f"{size:g} {label}", label, size) for size in args.bytes for label in ROWS]
    for key, label, size in wanted if args.bytes else []:
        if key in known:
            continue
        stats, _ = calibration()
        start = time.perf_counter()
        try:
            plan = planned(subject.model, stats, skip, label, size)
        except lr.BudgetError as error:
            print(f"{key}: {error}", flush=True)
            continue
        model = lr.factorize_(copy.deepcopy(subject.model), plan, stats=stats)
        seconds = time.perf_counter() - start
        sizes = [sum(each.bytes for each in side) for side in zip(*((e.after, e.before) for e in plan), strict=True)]
        in_int8 = sum(entry.bits is not None for entry in plan)
        known[key] = {"bytes kept, %": 100 * sizes[0] / sizes[1], "layers in int8, %": 100 * in_int8 / len(plan)}
        known[key] |= measured(model, subject, args.rounds) | {"seconds": seconds}
        yield key


def byte_report(known: Known) -> str:
    """The section of the result file; empty where nothing is known."""
    if not known:
        return ""
    head = list(dict.fromkeys(name for row in known.values() for name in row))
    ordered = sorted(known, key=lambda key: -known[key]["bytes kept, %"])
    lines = [[key, *(f"{known[key][name]:.2f}" for name in head)] for key in ordered]
    head_of_section = (
        "\n\n## Equal bytes\n\nA row begins with the limit on the bytes of the layers, as a part of their bytes now."
        " Rows with ranks are planned as the default.\n\n"
    )
    return head_of_section + markdown_table(["row", *head], lines)


def kept_rows(path: Path) -> Known:
    """The rows in a file; none where there is no file."""
    rows: Known = json.loads(path.read_text()) if path.exists() else {}
    return rows


def keep_rows(path: Path, known: Known) -> None:
    """Writes the rows."""
    with replacing(path) as kept:
        kept.write_text(json.dumps(known))
