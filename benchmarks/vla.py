"""A robot that follows instructions, at a tenth and a twentieth of its policy's parameters.

A vision-language-action policy of ten million parameters (`benchmarks/babyai.py`) is trained by behaviour cloning on
demonstrations of an expert, then compressed. "ours" is the plan from calibrated statistics, and recovery with the dense
policy as a teacher; "plain" is the same fraction of every layer by SVD, and fine-tuning on the expert's actions with as
many steps. Success is counted over episodes that are not among the demonstrations. Latency is that of one observation,
as on a robot, over that of the dense policy: the median of pairs.

Policies are kept in the folder ``--checkpoint``, so that a second run only measures, in two minutes; without them it
takes about half an hour of one core. Needs the extra robot.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_layers as lr
from benchmarks.babyai import LEVEL, Policy, demonstrations, success
from benchmarks.common import arguments, machine, markdown_table, write_result
from lowrank_layers.files import replacing

RATES = {"plain": 1e-3, "ours": 2e-5}
"""Learning rates after compression. For plain SVD it is the best of 1e-4, 3e-4, 1e-3 and 3e-3 in the first seed; what
the plan built is so close to the dense policy that 1e-4 makes it worse on held-out states."""
LIMITS = {0.1: (5.0, 0.4), 0.05: (7.0, 1.0)}
"""By fraction of the parameters: points of success that may be lost, and the latency that may be left."""
SUCCESS = "success, %"
Case = tuple[float, str, bool]
"""Fraction of the parameters, recipe, and whether the policy was recovered."""
TRAINING = 1_000_000
"""The first seed of the demonstrations; the episodes that are scored begin at 0."""
SMOKE = {"width": 32, "demonstrations": 40, "steps": 8, "calibration": 64, "recovery": 4, "episodes": 2, "seeds": 2}


class Runs:
    """The policies of all seeds and recipes, each trained once and kept in a folder.

    Args:
        folder: where they are kept.
        args: sizes and numbers of steps.
    """

    def __init__(self, folder: Path, args) -> None:
        self.folder, self.args = folder, args
        path = folder / f"demonstrations_{args.demonstrations}.safetensors"
        if not path.exists():
            found = demonstrations(range(TRAINING, TRAINING + args.demonstrations))
            with replacing(path) as temporary:
                save_file({str(k): part for k, part in enumerate(found)}, temporary)
        read = load_file(path)
        self.data = [read[key] for key in sorted(read)]
        self.example: tuple[Tensor, ...] = tuple(part[:1] for part in self.data)

    def dense(self, seed: int) -> nn.Module:
        """The policy before compression."""
        torch.manual_seed(seed)
        policy = Policy(self.args.width)
        optimizer = torch.optim.AdamW(policy.groups(3e-4), fused=True)
        return self._trained(policy, f"dense_{seed}", self.data, self.args.steps, seed, optimizer=optimizer)

    def factorized(self, seed: int, fraction: float, recipe: str) -> nn.Module:
        """The policy after compression."""
        path = self.folder / f"{recipe}_{fraction:g}_{seed}.safetensors"
        if not path.exists():
            dense, stats = self.dense(seed), None
            if recipe == "ours":
                parts = zip(*(part[: self.args.calibration].split(256) for part in self.data), strict=True)
                stats = lr.calibrate(dense, list(parts), loss=lr.SampledCrossEntropy())
                plan = lr.make_plan(dense, lr.Budget(params=fraction), stats=stats)
            else:
                plan = uniform_plan(dense, fraction)
            lr.save(lr.factorize_(copy.deepcopy(dense), plan, stats=stats), path)
        return lr.load(path, into=Policy(self.args.width)).eval()

    def recovered(self, seed: int, fraction: float, recipe: str) -> nn.Module:
        """The policy after compression and recovery, of which the best state on held-out demonstrations is kept."""
        policy, teacher = self.factorized(seed, fraction, recipe), self.dense(seed) if recipe == "ours" else None
        name = f"{recipe}_{fraction:g}_{seed}_recovered"
        held_out = self.args.held_out
        data, validation = ([part[k] for part in self.data] for k in (slice(-held_out), slice(-held_out, None)))
        settings = {"lr": RATES[recipe], "teacher": teacher, "validation": [tuple(validation)], "validate_every": 100}
        return self._trained(policy, name, data, self.args.recovery, seed, **settings)

    def _trained(self, policy: nn.Module, name: str, data: list[Tensor], steps: int, seed: int, **how) -> nn.Module:
        """The policy after so many steps, which are done once."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            order = {"shuffle": True, "drop_last": True, "generator": torch.Generator()}
            batches = DataLoader(TensorDataset(*data), self.args.batch, **order)
            lr.recover_(policy, batches, steps, dtype=torch.bfloat16, seed=seed, resume=self.folder / name, **how)
            lr.save(policy, path)
        return lr.load(path, into=Policy(self.args.width)).eval()


def uniform_plan(dense: nn.Module, fraction: float) -> lr.Plan:
    """Plain SVD at the same fraction of every layer, without the embeddings and the head, which are small."""
    linear = [layer for name, layer in dense.named_modules() if isinstance(layer, nn.Linear) and name != "head"]
    weights, total = sum(layer.weight.numel() for layer in linear), sum(p.numel() for p in dense.parameters())
    part = lr.ParameterFraction(1 - (1 - fraction) * total / weights)
    return lr.make_plan(dense, rank=part, methods=[lr.SVDMethod()], skip=["head", nn.Embedding])


def spread(values: list[float], digits: int) -> list[str]:
    """The values of the seeds, and their mean and standard deviation."""
    shown = f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    return [" / ".join(f"{value:.{digits}f}" for value in values), shown]


def measure(runs: Runs, fractions: Iterable[float], args) -> dict[Case, list[lr.Comparison]]:
    """The compressed policies beside the dense ones: for every case, one comparison per seed."""
    found: dict[Case, list[lr.Comparison]] = {}
    score = {SUCCESS: functools.cache(lambda policy: success(policy, range(args.episodes)))}
    for seed in range(args.seeds):
        dense = runs.dense(seed)
        for case in itertools.product(fractions, ("plain", "ours"), (False, True)):
            policy = (runs.recovered if case[2] else runs.factorized)(seed, *case[:2])
            compared = lr.compare(dense, policy, [runs.example], score=score, repeats=args.repeats)
            found.setdefault(case, []).append(compared)
            print(f"seed {seed}, {label(case)}\n{compared}\n", flush=True)
    return found


def label(case: Case) -> str:
    fraction, recipe, recovered = case
    return f"{fraction:.0%}, {recipe}{', recovered' if recovered else ''}"


def lost(comparison: lr.Comparison) -> float:
    """Points of success that compression cost."""
    return comparison.before.scores[SUCCESS] - comparison.after.scores[SUCCESS]


def report(found: dict[Case, list[lr.Comparison]]) -> str:
    """Success and latency of all cases, and the whole comparison of the first seed."""
    rows, details = [], []
    for k, (case, comparisons) in enumerate(found.items()):
        if not k:
            before = spread([each.before.scores[SUCCESS] for each in comparisons], 1)
            rows.append(("dense", f"{comparisons[0].before.params:,}", *before, "", ""))
        after = spread([each.after.scores[SUCCESS] for each in comparisons], 1)
        latency = spread([each.latency_ratio.median for each in comparisons], 3)[1]
        points = max(map(lost, comparisons))
        rows.append((label(case), f"{comparisons[0].after.params:,}", *after, f"{points:.1f}", latency))
        if case[1:] == ("ours", True):
            details.append(f"Seed 0, {label(case)}:\n\n{comparisons[0].to_markdown()}")
    head = ("policy", "parameters", "success, % per seed", "mean ± deviation", "most points lost", "latency")
    return "\n\n".join([markdown_table(head, rows), *details])


def beyond(found: dict[Case, list[lr.Comparison]], limits: dict[float, tuple[float, float]]) -> list[str]:
    """What does not hold: the cases of ours that lose more, or take longer, than they may."""
    wrong = []
    for case, comparisons in found.items():
        points, latency = limits[case[0]]
        if case[1:] == ("ours", True):
            slow = max(each.latency_ratio.median for each in comparisons) > latency
            wrong += [label(case)] if slow or max(map(lost, comparisons)) > points else []
    return wrong


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--checkpoint", type=Path, help="folder of the policies; by default a temporary one")
    parser.add_argument("--width", type=int, default=512, help="width of the policy")
    parser.add_argument("--seeds", type=int, default=3, help="number of policies")
    parser.add_argument("--demonstrations", type=int, default=30_000, help="episodes of the expert")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1_800, help="steps of training")
    parser.add_argument("--calibration", type=int, default=4_096, help="states to calibrate on")
    parser.add_argument("--recovery", type=int, default=500, help="steps of recovery and of fine-tuning")
    parser.add_argument("--held-out", type=int, default=2_048, help="states that no recovery is trained on")
    parser.add_argument("--episodes", type=int, default=512, help="episodes that are scored")
    parser.add_argument("--repeats", type=int, default=200, help="pairs of timed forward passes")
    parser.add_argument("--smoke", action="store_true", help="a tiny policy, seconds")
    args = parser.parse_args()
    limits = LIMITS
    if args.smoke:
        limits = {0.6: (100.0, 10.0)}
        vars(args).update(SMOKE, repeats=3, held_out=32)
    line = machine(args, "minigrid")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(Runs(folder, args), limits, args)
    wrong = beyond(found, limits)
    text = [
        f"# A robot that follows instructions\n\n{line}",
        f"{LEVEL}, {args.demonstrations:,} demonstrations, {args.steps:,} steps of training and {args.recovery:,} of"
        f" recovery at a batch of {args.batch}, {args.episodes} episodes per score; recovery keeps the best state on"
        f" {args.held_out:,} held-out states, the first one included",
        report(found),
        f"Beyond the limits: {'; '.join(wrong)}." if wrong else "Every limit holds in every seed.",
    ]
    path = write_result(args, "vla", "\n\n".join(text))
    print(text[-1], f"written to {path}", sep="\n")
    raise SystemExit(bool(wrong) and not args.smoke)


if __name__ == "__main__":
    main()
