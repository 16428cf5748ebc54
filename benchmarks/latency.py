"""Plans by measured latency: predicted and measured time of the whole model, and what is left of its accuracy.

Each model is planned at ``Budget(latency=...)`` for batches of one sample, on one thread, and factorized with its
calibration batches, without fine-tuning. "predicted" is the plan's, "measured" is the median over pairs of calls of the
factorized model's time over the dense one's, taken here, twice, and not by the plan. A plan may be off by 10 % of the
prediction, at half the time it may take at most 55 %, and it may never be slower than the dense model. A fraction that
is out of reach is named as such, and the least that is within reach is planned in its place.

SqueezeNet is planned twice, with torch's default memory format and with ``channels_last``. In the default format its
max-pooling takes a third of the dense model's time, but a third of that on smooth channels, such as those of low rank:
it compares element by element, and the processor guesses the results. In ``channels_last`` it takes a fifteenth of it.

The sentence model is looked for as in :mod:`benchmarks.without_loss`, the robot's policy (needs the extra robot) in the
folder ``--checkpoint`` of :mod:`benchmarks.vla`.
"""

from __future__ import annotations

import copy
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.babyai import Policy, success
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import ROOT, accuracy, available, cifar10, lenet, mnist, resnet20
from benchmarks.vision import import_torchvision
from benchmarks.without_loss import sentence_model
from lowrank_layers.compress.latency.fit import time_ratio
from lowrank_layers.compress.latency.run import ExampleRun

OFF = 0.10
"""By how much of the prediction the measurement may be off."""
AT_HALF = 0.55
"""The greatest part of the time that is allowed where half of it was asked for."""
NEAR = 1.02
"""Where a fraction is out of reach, this multiple of the least one is asked for."""
TWICE = 2
"""Measurements of each ratio."""


@dataclass
class Case:
    """A trained model with its calibration batches and its score; its layers are fitted one by one, or all at once."""

    name: str
    model: nn.Module
    batches: list[Any]
    loss: Any
    score: Callable[[nn.Module], float]
    skip: tuple[str, ...] = ()
    one_by_one: bool = True


def squeezenet() -> nn.Module:
    """The published SqueezeNet 1.1, 61.1 % on the photographs."""
    model = import_torchvision().models.squeezenet1_1()
    state = load_file(ROOT / "squeezenet" / "squeezenet1_1_imagenet_fp16.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def photographs(count: int) -> tuple[Tensor, Tensor]:
    """One photograph of each of the first classes, as SqueezeNet takes them, and their classes."""
    from PIL import Image

    mean = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    images = []
    with zipfile.ZipFile(ROOT / "squeezenet" / "imagenet_1000_227px_q90.zip") as file:
        for name in sorted(name for name in file.namelist() if name.lower().endswith((".jpeg", ".jpg")))[:count]:
            pixels = np.array(Image.open(io.BytesIO(file.read(name))).convert("RGB"))[:, :, ::-1]
            images.append(torch.from_numpy(pixels.copy()).movedim(2, 0).float() - mean)
    return torch.stack(images), torch.arange(len(images))


def robot(folder: Path) -> Case:
    """The first policy of benchmarks/vla.py, calibrated on the states of demonstrations."""
    policy = lr.load(folder / "dense_0.safetensors", into=Policy()).eval()
    demonstrations = load_file(next(folder.glob("demonstrations_*.safetensors")))
    batches = list(zip(*(demonstrations[str(k)][:2048].split(256) for k in range(4)), strict=True))
    curved = lr.SampledCrossEntropy()
    return Case("VLA policy, success in %", policy, batches, curved, lambda m: success(m, range(256)), one_by_one=False)


def cases(images: int, policies: Path | None, smoke: bool) -> Iterator[Case]:
    """The models, each made when it is its turn."""
    curved = lr.SampledCrossEntropy()
    if smoke:
        x, y = (part[:100] for part in mnist("test"))
        yield Case(
            "LeNet, MNIST", lenet(), list(mnist("train")[0][:100].split(50)), curved, lambda m: accuracy(m, x, y)
        )
        return
    x, y = (part[:images] for part in cifar10("test"))
    batches = list(cifar10("train")[0][:1000].split(250))
    yield Case("ResNet-20, CIFAR-10, accuracy in %", resnet20(), batches, curved, lambda m: accuracy(m, x, y))
    if available("squeezenet"):
        photos, classes = photographs(min(images, 1000))
        for form in (torch.contiguous_format, torch.channels_last):
            own = photos.to(memory_format=form)
            parts = list(own[::10].split(20))
            name = f"SqueezeNet{', channels_last' if form is torch.channels_last else ''}, photographs, top-1 in %"
            model = squeezenet().to(memory_format=form)
            yield Case(name, model, parts, curved, lambda m, own=own: accuracy(m, own, classes))
    if (found := sentence_model(400)) is not None:
        name = "all-MiniLM-L6-v2, mean cosine in %"
        yield Case(name, found.model, found.batches, None, lambda m: 100 * found.score(m), tuple(found.skip), False)
    if policies is not None:
        yield robot(policies)


def plan_for(case: Case, stats: lr.Statistics, fraction: float) -> lr.Plan:
    """The plan at a fraction of the time, or at the least one that can be reached."""
    settings = {"stats": stats, "skip": case.skip}
    for _ in range(4):
        try:
            return lr.make_plan(case.model, lr.Budget(latency=fraction), **settings)
        except lr.BudgetError as error:
            least = re.search(r"\(([\d.]+)%\)", str(error))
            if least is None or NEAR * float(least[1]) >= 100:
                raise
            fraction = NEAR * float(least[1]) / 100
    raise SystemExit(f"{case.name}: no fraction was reached")


def faults(fraction: float, predicted: float, measured: list[float]) -> list[str]:
    """What does not hold of a plan."""
    off = max(abs(ratio - predicted) for ratio in measured) / predicted
    wrong = {
        f"{off:.0%} off the prediction": off > OFF,
        f"more than {AT_HALF} of the time": fraction == 0.5 and max(measured) > AT_HALF,
        "slower than dense": max(measured) > 1,
    }
    return [fault for fault, is_so in wrong.items() if is_so]


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.75, 0.5], help="fractions of the dense time")
    parser.add_argument("--images", type=int, default=2_000, help="images per score; a tenth of the photos calibrates")
    parser.add_argument("--checkpoint", type=Path, help="folder of the robot's policies; by default there is none")
    parser.add_argument("--only", default="", help="only models with this in their name")
    parser.add_argument("--smoke", action="store_true", help="LeNet alone, few images")
    args = parser.parse_args()
    line = machine(args)
    table, failed = [], []
    for case in cases(args.images, args.checkpoint, args.smoke):
        if args.only not in case.name:
            continue
        stats = lr.calibrate(case.model, case.batches, loss=case.loss)
        before = case.score(case.model)
        for fraction in args.fractions:
            try:
                plan = plan_for(case, stats, fraction)
            except lr.BudgetError as error:
                print(case.name, fraction, error, sep=" | ", flush=True)
                table.append((case.name, f"{fraction:.2f}", "not faster", "", "", "", f"{before:.1f}", ""))
                continue
            asked = plan.settings["budget"]["latency"]
            predicted = plan.after.latency / plan.total.latency
            data = case.batches if case.one_by_one else None
            model = lr.factorize_(copy.deepcopy(case.model), plan, stats=stats, data=data)
            run = ExampleRun(stats.example, stats.with_target)
            measured = [time_ratio(case.model, model, run) for _ in range(TWICE)]
            kept = plan.after.params / plan.total.params
            after = case.score(model)
            reached = "" if asked == fraction else f" (least: {asked:.2f})"
            shown = " / ".join(f"{ratio:.3f}" for ratio in measured)
            times = (f"{1e3 * plan.total.latency:.2f}", f"{predicted:.3f}", shown)
            row = (case.name, f"{fraction:.2f}{reached}", *times, f"{kept:.1%}", f"{before:.1f}", f"{after:.1f}")
            table.append(row)
            print(*row, sep=" | ", flush=True)
            failed += [f"{case.name} at {fraction}: {fault}" for fault in faults(fraction, predicted, measured)]
    head = ("model", "asked", "dense, ms", "predicted", "measured", "parameters kept", "dense score", "score")
    verdict = "All within the limits." if not failed else "Not met: " + "; ".join(failed)
    parts = [
        "# Plans by measured latency",
        f"{line}; batch 1, no fine-tuning, {args.images:,} images per score",
        markdown_table(head, table),
        verdict,
    ]
    path = write_result(args, "latency", "\n\n".join(parts))
    print(f"{verdict}\nwritten to {path}")
    raise SystemExit(bool(failed) and not args.smoke)


if __name__ == "__main__":
    main()
