"""A policy of a recorded robot at 10 and 5 % of its parameters, beside plain SVD with the same fine-tuning.

The data are 100 teleoperated episodes of a Unitree G1 that picks up a bottle: states and actions at 30 Hz, and for 24
of them camera images once a second. The policy predicts the actions of the next second. Its error is measured on 20
episodes that it was not trained on (4 of them with images), twice a second, in units of each joint's standard
deviation: the mean of squares ("MSE") and of absolute values ("L1") over joints and the 30 actions of a chunk.

The plain recipe is a truncated SVD with the same ratio in every layer, convolutions included, and fine-tuning by the
recorded actions; ours is ``calibrate``, ``make_plan``, ``factorize_`` and ``recover_`` by the recorded actions and the
dense policy. Both take the same steps on the same batches, each at the better of two learning rates. "time" is the
forward pass of one sample with an image relative to the dense policy, the median of pairs.

Ours must have the smaller error at every size and in every seed. With ``--models FOLDER`` trained policies are kept
there and read again, so that times can be measured when the machine is quiet.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import available
from benchmarks.robot_data import Batches, Recording, recording, synthetic_recording
from benchmarks.robot_policy import ActionChunkPolicy

FRACTIONS = (0.1, 0.05)
SVD = [lr.SVDMethod()]
TRAINING = lr.RecoverySettings(lr=7e-4, warmup=0.05, weight_decay=0.05)
PLAIN = lr.RecoverySettings(lr=3e-3)
OURS = lr.RecoverySettings(lr=1e-3, distance="mse")
LABELS = ("plain SVD", "plain SVD, fine-tuned", "ours", "**ours, recovered**")
METRICS = {"MSE": F.mse_loss, "L1": F.l1_loss}


def split(data: Recording) -> tuple[list[int], list[int]]:
    """Episodes for training and held-out ones: a fifth of all, a sixth of those with images among them."""
    order = torch.randperm(int(data.episode.max()) + 1, generator=torch.Generator().manual_seed(0)).tolist()
    seen = set(data.episode[data.image >= 0].tolist())
    camera, others = [k for k in order if k in seen], [k for k in order if k not in seen]
    cut = len(camera) // 6
    rest = len(order) // 5 - cut
    return camera[cut:] + others[rest:], camera[:cut] + others[:rest]


def sampled_gaussian(output: Tensor, target: Tensor) -> Tensor:
    """The loss whose gradients have the Fisher matrix of a Gaussian prediction as their second moment."""
    return (output - (output + torch.randn_like(output)).detach()).square().flatten(1).sum(1).mean() / 2


def uniform_plan(model: nn.Module, fraction: float) -> lr.Plan:
    """A plan with the same ratio in every layer, the largest that meets the budget."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        plan = lr.make_plan(model, rank=lr.ParameterFraction(middle), methods=SVD)
        low, high = (middle, high) if plan.after.params <= fraction * plan.total.params else (low, middle)
    return lr.make_plan(model, rank=lr.ParameterFraction(low), methods=SVD)


class Bench:
    """The data, and how policies are trained on them.

    Args:
        args: sizes, and the folder of trained policies.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = synthetic_recording() if args.smoke else recording()
        self.training, held_out = split(self.data)
        self.frames = self.data.frames(self.training)
        self.test = self.data.frames(held_out, 15)
        self.held_out = self.data.batches(self.test, 64)
        self.calibration = self.data.batches(self.data.frames(self.training, args.calibrate), 64)

    def policy(self) -> ActionChunkPolicy:
        height, width = self.data.images.shape[2:]
        return ActionChunkPolicy(self.data.states.shape[1], self.args.width, self.args.depth, (height, width)).eval()

    def kept(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The policy of this name in the folder, or the one that is made, which is kept there."""
        if self.args.models is None:
            return make()
        path = self.args.models / f"{name}.safetensors"
        if not path.exists():
            self.args.models.mkdir(parents=True, exist_ok=True)
            lr.save(make(), path)
        return lr.load(path, into=self.policy())

    def dense(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.tuned(self.policy(), TRAINING, None, self.args.steps, seed)

    def tuned(
        self, model: nn.Module, settings: lr.RecoverySettings, teacher: nn.Module | None, steps: int, seed: int
    ) -> nn.Module:
        data = Batches(self.data, self.frames, 32, 1000)
        lr.recover_(model, data, settings, loss=F.mse_loss, teacher=teacher, steps=steps, seed=seed)
        return model

    def compressed(self, dense: nn.Module, seed: int) -> Iterator[tuple[float, str, nn.Module]]:
        """``(fraction, label, policy)`` of each row."""

        @cache
        def stats() -> lr.Statistics:
            torch.manual_seed(seed)
            return lr.calibrate(dense, self.calibration, loss=sampled_gaussian)

        def plain(fraction: float) -> nn.Module:
            return lr.factorize_(copy.deepcopy(dense), uniform_plan(dense, fraction))

        def ours(fraction: float) -> nn.Module:
            plan = lr.make_plan(dense, lr.Budget(params=fraction), stats=stats())
            return lr.factorize_(copy.deepcopy(dense), plan, stats=stats())

        for fraction in FRACTIONS:
            for make, labels, settings, teacher in (
                (plain, LABELS[:2], PLAIN, None),
                (ours, LABELS[2:], OURS, dense),
            ):
                name = f"{seed}_{fraction:g}_{make.__name__}"
                model = self.kept(name, partial(make, fraction))
                yield fraction, labels[0], model
                tuned = partial(self.tuned, model, settings, teacher, self.args.recovery, seed)
                yield fraction, labels[1], self.kept(f"{name}_tuned", tuned)

    def baselines(self) -> list[list[object]]:
        """The error of three predictions that know nothing of the task."""
        mean = self.data.actions[self.frames].mean(0)
        frames, actions = self.test, self.data.chunk(self.test)
        last = self.data.actions[(frames - 1).maximum(self.data.first[frames])]
        guesses = {
            "the mean action": mean,
            "the present state held": self.data.states[frames][:, None],
            "the last action held, which the policies do not see": last[:, None],
        }
        return [
            [label, "", *(f"{float(metric(guess.expand_as(actions), actions)):.4f}" for metric in METRICS.values())]
            for label, guess in guesses.items()
        ]


def shown(values: Sequence[float], digits: int = 4) -> str:
    """The mean of the seeds' values, the least and the greatest."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(label: str, found: Sequence[lr.Comparison]) -> list[str]:
    """A line of the table: one policy, over the seeds."""
    after = [each.after for each in found]
    growth = [100 * (each.ratios()["MSE"] - 1) for each in found]
    return [
        label,
        f"{statistics.mean(each.params for each in after):,.0f}",
        f"{statistics.mean(each.macs for each in after) / 1e6:.2f}",
        *(shown([each.scores[name] for each in after]) for name in METRICS),
        shown(growth, 1),
        shown([each.latency_ratio.median for each in found], 2),
    ]


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--seeds", type=int, default=3, help="policies that are trained and compressed")
    parser.add_argument("--width", type=int, default=256, help="width of the policy's tokens")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the policy")
    parser.add_argument("--steps", type=int, default=400, help="steps of training, of 32 samples")
    parser.add_argument("--recovery", type=int, default=200, help="steps of fine-tuning after compression")
    parser.add_argument("--calibrate", type=int, default=74, help="calibrates on one frame of so many")
    parser.add_argument("--models", type=Path, help="folder of trained policies")
    parser.add_argument("--smoke", action="store_true", help="a small policy of made-up data")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.width, args.depth, args.steps, args.recovery = 1, 64, 2, 4, 2
    elif not available("robot_g1"):
        raise SystemExit("robot_g1: got no folder robot_g1 in LOWRANK_DATA; see benchmarks/data.py.")
    line = machine(args)
    bench = Bench(args)
    example = tuple(part[:1] for part in bench.held_out[0])
    seen = [batch for batch in bench.held_out if len(batch) == 3]
    unseen = [(states, actions) for states, _, actions in seen]
    camera: list[list[float]] = []
    found: dict[float, dict[str, list[lr.Comparison]]] = {fraction: {} for fraction in FRACTIONS}
    for seed in range(args.seeds):
        dense = bench.kept(f"{seed}_dense", partial(bench.dense, seed))
        camera.append([lr.evaluate(dense, x, metric=METRICS, repeats=2).scores["MSE"] for x in (seen, unseen)])
        for fraction, label, model in bench.compressed(dense, seed):
            comparison = lr.compare(dense, model, bench.held_out, metric=METRICS, example=example)
            found[fraction].setdefault(label, []).append(comparison)
            print(seed, fraction, *row(label, [comparison]), sep=" | ", flush=True)
    before = [each.before for each in next(iter(found[FRACTIONS[0]].values()))]
    report = [
        f"# A policy of a recorded robot\n\n{line}; {args.seeds} seeds: mean (least to greatest)\n\n"
        f"{args.steps} steps of training and {args.recovery} of fine-tuning, of 32 samples; calibrated on"
        f" {sum(len(batch[0]) for batch in bench.calibration)} samples; {len(bench.test)} held-out samples.\n",
        markdown_table(
            ("prediction", "parameters", *METRICS),
            [
                *bench.baselines(),
                ["the dense policy", f"{before[0].params:,}", *(shown([e.scores[n] for e in before]) for n in METRICS)],
            ],
        ),
    ]
    failed: list[str] = []
    head = ("policy", "parameters", "million MACs", *METRICS, "growth of MSE, %", "time")
    for fraction, rows in found.items():
        table = markdown_table(head, [row(label, each) for label, each in rows.items()])
        report.append(f"\n## {fraction:.0%} of the parameters\n\n{table}")
        for seed, (plain, ours) in enumerate(zip(rows[LABELS[1]], rows[LABELS[3]], strict=True)):
            if not ours.after.scores["MSE"] < plain.after.scores["MSE"]:
                failed.append(f"{fraction:.0%}, seed {seed}")
    latency = statistics.median(each.latency.median for each in before)
    report.append(
        f"\nThe dense policy takes {1e3 * latency:.2f} ms and {before[0].macs / 1e6:.2f} million MACs. On the"
        f" {sum(len(batch[0]) for batch in seen)} held-out samples with images its MSE is"
        f" {shown([pair[0] for pair in camera])} with them, {shown([pair[1] for pair in camera])} without."
    )
    report.append(
        "\nOurs has the smaller error everywhere." if not failed else "\nNot the smaller error: " + "; ".join(failed)
    )
    print(f"{report[-1]}\nwritten to {write_result(args, 'robot_g1', chr(10).join(report))}")
    raise SystemExit(bool(failed) and not args.smoke)


if __name__ == "__main__":
    main()
