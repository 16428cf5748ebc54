"""Lesson 4: compress far, and train the small model on what the dense one says.

python examples/04_recover.py [--budget 0.04] [--steps 400] [--epochs 30] [--out DIR]

Recovery is distillation: the dense model teaches the small one, and the best state on held-out pictures is kept.
Going down by turns, a budget and a recovery at a time, gives a measured point at each size. Which of the two ways ends
higher depends on the model and the steps, so both are tried, with the same number of steps in all.
"""

from __future__ import annotations

import copy

from course import begin, lesson, save
from digits import accuracy, build, digits, train

import lowrank_layers as lr
from lowrank_layers import plot


def main() -> None:
    parser = lesson(__doc__, epochs=30)
    parser.add_argument("--budget", type=float, default=0.04, help="fraction of the parameters to keep")
    parser.add_argument("--steps", type=int, default=400, help="steps of training in all")
    args = parser.parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    x, y, x_held, y_held = x[:1100], y[:1100], x[1100:], y[1100:]
    dense = build()
    train(dense, x, y, epochs=args.epochs)
    dense.eval()
    batches = list(zip(x.split(50), y.split(50), strict=True))

    def score(model) -> float:
        return accuracy(model, x_held, y_held)

    at_once = copy.deepcopy(dense)
    stats = lr.calibrate(at_once, batches, loss=lr.SampledCrossEntropy())
    lr.factorize_(at_once, lr.make_plan(at_once, lr.Budget(params=args.budget), stats=stats), stats=stats, data=batches)
    before = accuracy(at_once, x_test, y_test)
    recovery = lr.recover_(at_once, batches, args.steps, teacher=dense, score=score, lr=2e-3)
    print(f"\n{recovery}\n")

    by_turns = copy.deepcopy(dense)
    budgets = [0.3, 0.1, args.budget]
    steps = args.steps // len(budgets)
    history = lr.progressive_(by_turns, budgets, steps, data=batches, teacher=dense, score=score, lr=2e-3)
    print(f"{history}\n")

    rows = {
        "dense": accuracy(dense, x_test, y_test),
        f"at {args.budget:.0%} of the parameters, at once": before,
        f"the same after {args.steps} steps of recovery": accuracy(at_once, x_test, y_test),
        f"by turns ({', '.join(f'{b:.0%}' for b in budgets)}), {steps} steps each": accuracy(by_turns, x_test, y_test),
    }
    for label, right in rows.items():
        print(f"{label:48}{right:>8.1f} % of the test digits read correctly")

    left, right = plot.panels(2)
    plot.recovery(recovery, ax=left)
    save(plot.progression(history, ax=right), args.out / "04_recover.png")


if __name__ == "__main__":
    main()
