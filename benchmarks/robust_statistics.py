"""Settings of calibration against outliers, compared on trained models.

Every row is the default but for one setting: rows of inputs clipped at 3 or 10 times their median length, the first
tokens of each window left out, queries and keys with ``G = I``, other ridges (``Damping``), moments of gradients as
diagonal plus low rank in layers of more than 514 outputs. Compression in one shot by channel SVD alone, statistics with
gradients, no fine-tuning. SmolLM2 is calibrated on 8 windows of 256 tokens of WikiText-2 (valid) and scored on 8 others
(test); MiniLM on 600 sentences and scored by the mean cosine between its embeddings and the dense model's, on others;
the image models on 1,000 training and 4,000 test images of CIFAR-10. The default's statistics are those of two halves
of the samples, merged. What the two halves give alone differs by chance only: a setting counts as better where its gain
is larger than that difference.

Rows that are done are kept in the folder ``--work``, with the weights of the ViT, and not measured again. SmolLM2 and
MiniLM come from the packages of ``benchmarks/smollm2.py`` and ``benchmarks/without_loss.py``.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.robust_subjects import SUBJECTS, Subject, smoke
from lowrank_layers.files import replacing

HALVES = ("one half of the samples", "the other half")


@dataclass(frozen=True)
class Setting:
    """One row of the tables.

    Args:
        calibration: arguments of ``calibrate``.
        damping: ridges.
        isotropic: whether queries and keys have ``G = I``.
    """

    calibration: Mapping[str, Any] = field(default_factory=dict)
    damping: lr.Damping = field(default_factory=lr.Damping)
    isotropic: bool = False


SETTINGS = {
    "default": Setting(),
    "queries and keys with G = I": Setting(isotropic=True),
    "damping of outputs 0.01": Setting(damping=lr.Damping(outputs=0.01)),
    "damping of outputs 1": Setting(damping=lr.Damping(outputs=1.0)),
    "damping of inputs 1e-4": Setting(damping=lr.Damping(inputs=1e-4)),
    "damping of inputs 1e-2": Setting(damping=lr.Damping(inputs=1e-2)),
    "clip 3": Setting({"clip": 3}),
    "clip 10": Setting({"clip": 10}),
    "gradients as diagonal and 256 directions": Setting({"sketch_above": 0}),
    "first token left out": Setting({"mask": lr.LeaveOut(first=1)}),
    "first 4 tokens left out": Setting({"mask": lr.LeaveOut(first=4)}),
}


def applies(setting: Setting, subject: Subject) -> bool:
    """Whether a setting means anything for a model."""
    for_text = not {"mask", "sketch_above"}.isdisjoint(setting.calibration)  # the image models have no wide layers
    return (subject.is_text or not for_text) and (bool(subject.queries) or not setting.isotropic)


def scores(subject: Subject, stats: lr.Statistics, setting: Setting) -> list[float]:
    """The scores at all sizes."""
    stats = stats.isotropic(subject.queries) if setting.isotropic else stats
    found = []
    for fraction in subject.fractions:
        budget = lr.Budget(params=fraction, of="planned")
        plan = lr.make_plan(subject.model, budget, stats, [lr.SVDMethod()], skip=subject.skip, damping=setting.damping)
        found.append(subject.score(lr.factorize_(copy.deepcopy(subject.model), plan, stats=stats)))
    return found


def measured(subject: Subject, known: Mapping[str, list[float]], only: str) -> Iterator[tuple[str, list[float]]]:
    """The rows that are not known yet, of those that a regular expression matches."""
    calibrated: Mapping[str, Any] | None = None
    for label, setting in SETTINGS.items():
        wanted = [label, *(HALVES if label == "default" else ())]
        if not applies(setting, subject) or not re.search(only, label) or all(name in known for name in wanted):
            continue
        if setting.calibration != calibrated:
            halves = [
                lr.calibrate(
                    subject.model, half, subject.loss(seed), target=[subject.is_planned], **setting.calibration
                )
                for seed, half in enumerate(subject.halves)
            ]
            if label == "default":
                for name, half in zip(HALVES, halves, strict=True):
                    yield name, scores(subject, half, setting)
            stats, calibrated = halves[0].merge(halves[1]), setting.calibration
            del halves
        yield label, scores(subject, stats, setting)


def rows_of(subject: Subject, path: Path, only: str) -> dict[str, list[float]]:
    """All rows of a model, kept in a file meanwhile."""
    rows: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    for label, found in measured(subject, rows, only):
        rows[label] = found
        print(subject.name, label, *found, sep=" | ", flush=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows))
    return rows


def gains(subject: Subject, rows: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """How much better each setting is than the default, at each size, over the difference between the halves."""
    noise = [abs(one - other) for one, other in zip(*(rows[half] for half in HALVES), strict=True)]
    return {
        label: [
            subject.sign * (own - base) / max(n, 1e-9)
            for own, base, n in zip(rows[label], rows["default"], noise, strict=True)
        ]
        for label in SETTINGS
        if label in rows and label != "default"
    }


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--only", default="", help="a regular expression for the rows to measure; kept ones are shown")
    parser.add_argument("--work", type=Path, help="folder for weights and finished rows; by default a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a random model, to see that the script runs")
    args = parser.parse_args()
    report = [f"# Settings of calibration against outliers\n\n{machine(args)}; channel SVD, one shot\n"]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in ["smoke"] if args.smoke else args.models:
            subject = smoke(work) if args.smoke else SUBJECTS[name](work)
            rows = rows_of(subject, work / f"{name}.json", args.only)
            head = ["setting", *(f"{fraction:.0%} of the layers" for fraction in subject.fractions)]
            table = [
                [label, *(f"{score:.{subject.digits}f}" for score in rows[label])]
                for label in (*SETTINGS, *HALVES)
                if label in rows
            ]
            dense = f"Dense: {subject.score(subject.model):.{subject.digits}f}"
            report.append(f"## {subject.name}\n\n{dense}\n\n{markdown_table(head, table)}\n")
            for label, own in gains(subject, rows).items():
                found[label] = found.get(label, []) + own
    better = [label for label, own in found.items() if min(own) > 1]
    report.append(
        "Better than the default wherever it applies, by more than the two halves of the samples differ:"
        f" {', '.join(better) or 'no setting'}."
    )
    print(f"{report[-1]}\nwritten to {write_result(args, 'robust_statistics', chr(10).join(report))}")


if __name__ == "__main__":
    main()
