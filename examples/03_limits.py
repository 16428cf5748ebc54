"""Lesson 3: say what the device can bear, in parameters, bytes, multiplications, time or loss.

python examples/03_limits.py [--epochs 30] [--out DIR]

A budget may have several limits at once; all of them hold. Times are measured on this machine, inside the running
model. A predicted loss is an estimate, too low where much is removed. A limit that cannot be met is an error that says
so, and the model stays as it was.
"""

from __future__ import annotations

import copy

from course import begin, lesson, save
from digits import accuracy, build, digits, train

import lowrank_layers as lr
from lowrank_layers import plot

BUDGETS = {
    "a third of the parameters": lr.Budget(params=0.33),
    "files of 60 KB": lr.Budget(bytes=60_000),
    "half of the multiplications": lr.Budget(macs=0.5),
    "half the parameters, no slower": lr.Budget(params=0.5, latency=1.0),
    "a predicted loss 0.05 higher": lr.Budget(loss=0.05),
}


def row(label: str, cost: lr.Cost, right: float) -> str:
    return f"{label:32}{cost.params:>12,}{cost.bytes:>10,}{cost.macs:>10,}{right:>16.1f} %"


def main() -> None:
    args = lesson(__doc__, epochs=30).parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    dense = build()
    train(dense, x, y, epochs=args.epochs)
    batches = list(x.split(250))
    stats = lr.calibrate(dense.eval(), batches, loss=lr.SampledCrossEntropy())

    plans, points = {}, {}
    print(f"\n{'':32}{'parameters':>12}{'bytes':>10}{'MACs':>10}{'read correctly':>18}")
    for label, budget in BUDGETS.items():
        try:
            plan = lr.make_plan(dense, budget, stats=stats, example=x_test[:256])
        except lr.BudgetError as error:  # whether so small a model can gain time depends on the machine
            print(f"{label:32}not possible: {error}")
            continue
        small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches)
        plans[label], points[label] = plan, [(plan.after.params, accuracy(small, x_test, y_test))]
        print(row(label, plan.after, points[label][0][1]))
    files = plans["files of 60 KB"]
    print(row("(dense)", files.total, accuracy(dense, x_test, y_test)))
    print(f"\nThe plan for files of 60 KB:\n\n{files}\n")

    left, right = plot.panels(2)
    plot.plan(files, cost="bytes", ax=left)
    save(plot.size_score_front(points, score="digits read correctly, %", ax=right), args.out / "03_limits.png")


if __name__ == "__main__":
    main()
