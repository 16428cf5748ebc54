"""Reproduces a published SVD compression table of LeNet on MNIST, and sets our plans beside it.

Nothing is fine-tuned, calibration uses training images only, and accuracy is measured on the 10,000 test images.
"""

from __future__ import annotations

import copy

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import accuracy, lenet, mnist

RATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
PUBLISHED = {
    "all layers": ((35209, 95.80), (30921, 92.75), (26436, 79.09), (21772, 63.92), (17287, 38.61), (12999, 23.00)),
    "fully connected": ((35840, 96.76), (31718, 95.02), (27596, 89.79), (23098, 75.52), (18976, 61.63), (14854, 46.57)),
}
BARS = {12999: 97.7, 8885: 97.4, 6663: 96.5, 4442: 91.0}


def published_rule(rate: float, *, convolutions: bool) -> lr.Plan:
    """The plan of the published table: every layer at the same ratio, by plain SVD."""
    skip = [] if convolutions else ["conv1", "conv2"]
    return lr.make_plan(lenet(), rank=lr.ParameterFraction(1 - rate), methods=[lr.SVDMethod()], skip=skip)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--images", type=int, default=4000, help="training images to calibrate on")
    parser.add_argument("--units", action="store_true", help="also compare the units of the layers' losses")
    args = parser.parse_args()
    line = machine(args)
    images, labels = mnist("test")
    dense = lenet().to(args.device)

    def measure(model):
        return sum(p.numel() for p in model.parameters()), accuracy(model, images, labels)

    report = [f"# LeNet on MNIST, no fine-tuning\n\n{line}; {args.images} training images for calibration\n"]
    params, base = measure(dense)
    report.append(f"Dense: {params:,} parameters, {base:.2f} %.\n")

    failed = []
    for title, rows in PUBLISHED.items():
        table = []
        for rate, (their_params, their_accuracy) in zip(RATES, rows, strict=True):
            plan = published_rule(rate, convolutions=title == "all layers")
            params, right = measure(lr.factorize_(copy.deepcopy(dense), plan))
            same = params == their_params and f"{right:.2f}" == f"{their_accuracy:.2f}"
            failed += [] if same else [f"published table, {title}, rate {rate}"]
            their_cells, our_cells = (f"{their_params:,}", f"{their_accuracy:.2f}"), (f"{params:,}", f"{right:.2f}")
            table.append((rate, *their_cells, *our_cells, "yes" if same else "NO"))
        head = ("rate", "published parameters", "published accuracy", "parameters", "accuracy", "to the digit")
        report.append(f"## Published rule, {title}\n\n{markdown_table(head, table)}\n")

    batches = [x.to(args.device) for x in mnist("train")[0][: args.images].split(1000)]
    stats = lr.calibrate(dense, batches, loss=lr.SampledCrossEntropy())
    theirs = dict(PUBLISHED["all layers"])
    table = []
    for size in (*theirs, 8885, 6663, 4442):
        plan = lr.make_plan(dense, lr.Budget(params=size), stats=stats)
        params, right = measure(lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches))
        by_batches = lr.make_plan(dense, lr.Budget(params=size), stats=stats, batches=batches)
        measured = measure(lr.factorize_(copy.deepcopy(dense), by_batches, stats=stats, data=batches))[1]
        one_shot = measure(lr.factorize_(copy.deepcopy(dense), plan, stats=stats))[1]
        bar = BARS.get(size)
        failed += [] if bar is None or right >= bar else [f"ours at {size}: {right:.2f} < {bar}"]
        ranks = ", ".join(f"{e.name} {e.method}{'' if e.rank is None else f' {e.rank}'}" for e in plan)
        published = f"{theirs[size]:.2f}" if size in theirs else ""
        accuracies = (f"{one_shot:.2f}", f"**{right:.2f}**", f"{measured:.2f}")
        row = (f"{size:,}", f"{params:,}", published, *accuracies, bar or "", ranks)
        table.append(row)
    head = ("budget", "parameters", "published", "ours, one shot", "ours", "measured", "bar", "plan")
    title = "## Ours: make_plan(budget), then factorize_ with data, defaults; measured: make_plan with batches"
    report.append(f"{title}\n\n{markdown_table(head, table)}\n")

    if args.units:
        table = []
        for units in ("absolute", "relative", "balanced"):
            plans = [lr.make_plan(dense, lr.Budget(params=size), stats=stats, units=units) for size in BARS]
            models = [lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches) for plan in plans]
            table.append((units, *(f"{measure(model)[1]:.2f}" for model in models)))
        report.append(f"## How losses of layers compare\n\n{markdown_table(('units', *map(str, BARS)), table)}\n")
    report.append("All reproduced, all bars met." if not failed else "Not met: " + "; ".join(failed))
    text = "\n".join(report)
    print(text)
    print(f"\nwritten to {write_result(args, 'seed_lenet', text)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
