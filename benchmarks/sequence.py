"""Time of the sequential regression against depth: passes that pause before each layer, and passes from the start.

ResNet-20 and ResNet-32 of CIFAR-10 are factorized to half of their parameters, twice in the same run: as the library
does it, and with nothing held between layers (``side_by_side.HELD = 0``), so that the forward passes of both models
start from anew for each layer. Plans and statistics are the same; CPU seconds of ``factorize_`` alone; the whole test
set.
"""

from __future__ import annotations

import copy
import time

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import accuracy, cifar10, resnet
from lowrank_layers.compress import side_by_side

BAR = 0.2
"""At most this part of the time, for the deepest network."""


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--images", type=int, default=1000, help="training images to calibrate on")
    parser.add_argument("--smoke", action="store_true", help="the last stage of ResNet-20, few images, no claims")
    args = parser.parse_args()
    line = machine(args)
    rows, ratio = [], 1.0
    images, labels = (each[: 200 if args.smoke else None] for each in cifar10("test"))
    for depth in (20,) if args.smoke else (20, 32):
        dense = resnet(depth)
        batches = list(cifar10("train")[0][: 100 if args.smoke else args.images].split(250))
        stats = lr.calibrate(dense, batches, loss=lr.SampledCrossEntropy())
        skip = ["layer1", "layer2"] if args.smoke else []
        plan = lr.make_plan(dense, lr.Budget(params=0.5), stats=stats, skip=skip)
        taken, found = [], []
        for held in (0, side_by_side.HELD):
            model, before = copy.deepcopy(dense), side_by_side.HELD
            side_by_side.HELD = held
            start = time.process_time()
            lr.factorize_(model, plan, stats=stats, data=batches)
            taken.append(time.process_time() - start)
            side_by_side.HELD = before
            found.append(accuracy(model, images, labels))
        ratio = taken[1] / taken[0]
        seconds, scores = (f"{second:.0f}" for second in taken), (f"{score:.2f} %" for score in found)
        rows.append((f"ResNet-{depth}", *seconds, f"{ratio:.3f}", *scores))
        print(" | ".join(rows[-1]), flush=True)
    head = (
        "network",
        "from the start, CPU s",
        "pausing, CPU s",
        "ratio",
        "accuracy, from the start",
        "accuracy, pausing",
    )
    report = f"# Sequential regression against depth\n\n{line}; {len(batches)} batches\n\n{markdown_table(head, rows)}"
    met = ratio <= BAR
    if not args.smoke:
        report += f"\n\nThe bar for the deepest network, {BAR}, is {'met' if met else 'NOT met'}."
    print(f"written to {write_result(args, 'sequence', report)}")
    raise SystemExit(not (met or args.smoke))


if __name__ == "__main__":
    main()
