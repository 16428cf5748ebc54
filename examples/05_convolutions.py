"""Lesson 5: the ways to take a convolution apart: pairs, Tucker and CP.

python examples/05_convolutions.py [--epochs 30] [--out DIR]

A kernel is a tensor with four axes. A pair splits it in two convolutions, Tucker squeezes its channels around a small
core, and CP makes it a chain of four thin ones. By default a plan chooses among all of them, layer by layer.
"""

from __future__ import annotations

import copy

from course import begin, lesson, save
from digits import accuracy, build, digits, train

import lowrank_layers as lr
from lowrank_layers import plot

METHODS = {
    "pairs (SVD)": [lr.SVDMethod()],
    "Tucker": [lr.TuckerMethod()],
    "CP": [lr.CPMethod()],
    "the best of all": None,
}


def main() -> None:
    args = lesson(__doc__, epochs=30).parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    dense = build()
    train(dense, x, y, epochs=args.epochs)
    dense.eval()

    kernel = dense.conv2.weight.detach()
    ranks = (4, 8, 16, 24, 32)
    fits = {
        "pair": [lr.svd(kernel.flatten(1), rank) for rank in ranks],
        "Tucker": [lr.tucker(kernel, (rank, rank, 3, 3)) for rank in ranks],
        "CP": [lr.cp(kernel, rank, starts=1) for rank in ranks],
    }
    alone = {
        label: [(fit.numel(), fit.relative_error(kernel.flatten(1) if label == "pair" else kernel)) for fit in each]
        for label, each in fits.items()
    }
    print(f"\nThe kernel alone, {kernel.numel():,} numbers:\n")
    print(f"{'rank':>6}" + "".join(f"{label + ': numbers':>16}{'error':>9}" for label in fits))
    for rank, *found in zip(ranks, *alone.values(), strict=True):
        print(f"{rank:>6}" + "".join(f"{numbers:>16,}{error:>9.1%}" for numbers, error in found))

    batches = list(x.split(250))
    stats = lr.calibrate(dense, batches, loss=lr.SampledCrossEntropy())
    print("\nIts layer in the network, planned with each method (the linear layers stay dense):\n")
    points = {}
    for label, methods in METHODS.items():
        points[label] = []
        for budget in (0.5, 0.25, 0.13):
            limit = lr.Budget(params=budget, of="planned")
            plan = lr.make_plan(dense, limit, stats=stats, methods=methods, skip=["fc1", "fc2", "conv1"])
            small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches)
            (entry,) = plan
            points[label].append((entry.after.params, accuracy(small, x_test, y_test)))
        print(f"{label:18}" + "   ".join(f"{size:>6,}: {right:.1f} %" for size, right in points[label]))

    left, right = plot.panels(2)
    plot.size_score_front(alone, higher_is_better=False, size="numbers", score="relative error", ax=left)
    left.set_title("The kernel alone")
    plot.accuracy_against_size(points, ax=right)
    right.set(xlabel="parameters of the layer", title="The layer in the network")
    save(right.figure, args.out / "05_convolutions.png")


if __name__ == "__main__":
    main()
