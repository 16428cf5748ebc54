"""Lesson 2: train a small CNN on handwritten digits, compress it to a budget, save it and load it again.

python examples/02_compress.py [--budget 0.3] [--data digits | --data mnist --folder DIR] [--epochs 30] [--out DIR]
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from course import begin, lesson, save
from digits import accuracy, build, digits, mnist, train
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers import plot


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def print_no_slower(dense: nn.Module, stats: lr.Statistics, batches: list[Tensor], x: Tensor, y: Tensor) -> None:
    """Prints what a plan that is measured to be no slower than the dense model gives."""
    try:
        plan = lr.make_plan(dense, lr.Budget(params=0.5, latency=1.0), stats=stats, example=x[:512])
    except lr.BudgetError as error:  # so small a model may have nothing to gain, which depends on the machine
        print(f"   {error} The model stays as it is.")
        return
    small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches)
    score = {"digits read correctly, %": lambda model: accuracy(model, x, y)}
    print(lr.compare(dense, small, [(x[:512], y[:512])], score=score, repeats=50))


def main() -> None:
    parser = lesson(__doc__, epochs=30)
    parser.add_argument("--budget", type=float, default=0.3, help="fraction of the parameters to keep")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--folder", type=Path, help="folder of MNIST's idx files")
    args = parser.parse_args()
    begin(args)

    x, y, x_test, y_test = digits() if args.data == "digits" else mnist(args.folder)
    dense = build(x.shape[-1])
    train(dense, x, y, epochs=args.epochs)
    dense.eval()
    right = accuracy(dense, x_test, y_test)
    print(f"\n1. A network was trained on {len(x):,} pictures of handwritten digits. It has {size(dense):,} numbers")
    print(f"   (parameters) and reads {right:.1f} % of {len(x_test):,} other pictures correctly.")

    small = copy.deepcopy(dense)
    batches = list(x[:1500].split(250))
    stats = lr.calibrate(small, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(small, lr.Budget(params=args.budget), stats=stats)
    lr.factorize_(small, plan, stats=stats, data=batches)
    print(f"\n2. It was compressed to {args.budget:.0%} of its numbers, without training it again. A plan says which")
    print(f"   layers are replaced by products of smaller ones, and at which rank:\n\n{plan}")

    print("\n3. Before and after (MACs are the multiplications that one picture takes):\n")
    score = {"digits read correctly, %": lambda model: accuracy(model, x_test, y_test)}
    print(lr.compare(dense, small, [(x_test[:64], y_test[:64])], score=score))

    before, after = args.out / "dense.safetensors", args.out / "small.safetensors"
    lr.save(dense, before)
    lr.save(small, after)
    loaded = lr.load(after, into=build(x.shape[-1])).eval()
    with torch.inference_mode():
        if not torch.equal(loaded(x_test), small(x_test)):
            raise SystemExit("the loaded model differs from the saved one")
    print(f"\n4. Saved and loaded: {after.stat().st_size:,} bytes in place of {before.stat().st_size:,}.")
    print("   The loaded model gives outputs identical to the bit.")

    print("\n5. How far it goes, without training it again; digits read correctly at several sizes:\n")
    ours, plain = "lowrank_layers", "plain SVD of the weights"
    print(f"   {'parameters':>12}{ours:>18}{plain:>28}")
    curves: dict[str, list[tuple[int, float]]] = {ours: [], plain: []}
    for budget in sorted({0.5, args.budget, 0.1, 0.05}, reverse=True):
        for label, known in ((ours, stats), (plain, None)):
            each = copy.deepcopy(dense)
            methods, data = (None, batches) if known else ([lr.SVDMethod()], None)
            chosen = lr.make_plan(each, lr.Budget(params=budget), stats=known, methods=methods)
            lr.factorize_(each, chosen, stats=known, data=data)
            curves[label].append((size(each), accuracy(each, x_test, y_test)))
        (numbers, good), (_, worse) = curves[ours][-1], curves[plain][-1]
        print(f"   {numbers:>12,}{good:>16.1f} %{worse:>26.1f} %")

    print("\n6. A smaller model is not always a faster one. A budget can ask for both, and layers are then timed here:")
    print("   half of the numbers, and no slower.\n")
    print_no_slower(dense, stats, batches, x_test, y_test)

    first, second = plot.panels(2)
    plot.spectra(dense, plan, stats, ax=first)
    plot.accuracy_against_size(curves, dense=(size(dense), right), ax=second)
    print()
    save(second.figure, args.out / "02_compress.png")
    print(f"model:   {after}")


if __name__ == "__main__":
    main()
