"""Train a small CNN on handwritten digits, compress it to a budget, save it, load it, and plot the result.

python examples/quickstart.py [--budget 0.3] [--data digits | --data mnist --folder DIR] [--out quickstart_out]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_layers as lr
from lowrank_layers import plot


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 1,347 to train on, 450 to test."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    return x[train], y[train], x[test], y[test]


def mnist(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST, read from its own idx files, gzipped or not, in a folder or in ../shared/data."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.data import mnist as read

    return *read("train", folder), *read("test", folder)


def build(size: int) -> nn.Module:
    """A CNN for images of ``size`` x ``size`` pixels."""
    side = size // 4
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(64 * side * side, 128),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(128, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seconds: float) -> None:
    """Trains with AdamW and one cycle of the learning rate, for at most ``seconds``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    deadline = time.perf_counter() + seconds
    with tqdm(total=steps, desc="train") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                if time.perf_counter() > deadline:
                    return
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of images classified correctly."""
    batches = zip(x.split(500), y.split(500), strict=True)
    return 100 * sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches) / len(x)


@torch.inference_mode()
def milliseconds(models: list[nn.Module], x: Tensor, rounds: int = 30) -> list[float]:
    """Median time of a forward pass per model; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken[3:]) for taken in times]


def print_latency_plan(dense: nn.Module, batches: list[Tensor], stats: lr.Statistics, x: Tensor, y: Tensor) -> None:
    """Prints a plan for half the parameters that may not be slower than the dense model, and what it gives."""
    print("\nhalf the parameters, and not slower:")
    try:
        plan = lr.make_plan(dense, lr.Budget(params=0.5, latency=1.0), stats=stats, example=x[:512])
    except lr.BudgetError as error:  # so small a model may have nothing to gain, which depends on the machine
        print(f"{error} It stays dense.\n")
        return
    small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats, data=batches)
    score = {"accuracy": lambda model: accuracy(model, x, y)}
    comparison = lr.compare(dense, small, [(x[:512], y[:512])], score=score, repeats=50)
    print(f"{plan}\n\n{comparison}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.3, help="fraction of the parameters to keep")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--folder", type=Path, help="folder of MNIST's idx files")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, help="use only this many images for training and for testing")
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    x, y, x_test, y_test = digits() if args.data == "digits" else mnist(args.folder)
    x, y, x_test, y_test = (part[: args.images] for part in (x, y, x_test, y_test))
    size = x.shape[-1]
    model = build(size)
    train(model, x, y, epochs=args.epochs or (30 if args.data == "digits" else 2), seconds=60)
    dense = copy.deepcopy(model.eval())

    batches = list(x[:1500].split(250))
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy(), progress=True)
    plan = lr.make_plan(model, lr.Budget(params=args.budget), stats=stats)
    print(f"\n{plan}\n")
    lr.factorize_(model, plan, stats=stats, data=batches, progress=True)

    lr.save(dense, args.out / "dense.safetensors")
    lr.save(model, args.out / "small.safetensors")
    loaded = lr.load(args.out / "small.safetensors", into=build(size)).eval()
    with torch.inference_mode():
        identical = torch.equal(loaded(x_test), model(x_test))
    if not identical:
        raise SystemExit("the loaded model differs from the saved one")

    latency = milliseconds([dense, model], x_test[:64])
    print(f"\n{'':22}{'before':>12}{'after':>12}")
    rows: list[tuple[str, str, list[float]]] = [
        ("test accuracy, %", ".2f", [accuracy(net, x_test, y_test) for net in (dense, model)]),
        ("parameters", ",.0f", [sum(p.numel() for p in net.parameters()) for net in (dense, model)]),
        ("file, bytes", ",.0f", [(args.out / f"{n}.safetensors").stat().st_size for n in ("dense", "small")]),
        ("64 images, ms", ".2f", latency),
    ]
    for name, style, (before, after) in rows:
        print(f"{name:22}{before:>12{style}}{after:>12{style}}")
    print("loaded from the file: outputs identical to the bit")

    plain: list[tuple[int, float]] = []
    ours: list[tuple[int, float]] = [(sum(p.numel() for p in model.parameters()), accuracy(model, x_test, y_test))]
    for budget in tqdm((0.5, 0.2, 0.1, 0.05), desc="accuracy against size"):
        for points, known in ((plain, None), (ours, stats)):
            small = copy.deepcopy(dense)
            choice = lr.make_plan(
                small, lr.Budget(params=budget), stats=known, methods=None if known else [lr.SVDMethod()]
            )
            lr.factorize_(small, choice, stats=known, data=None if known is None else batches)
            points.append((sum(p.numel() for p in small.parameters()), accuracy(small, x_test, y_test)))

    print_latency_plan(dense, batches, stats, x_test, y_test)

    left, right = plot.panels(2)
    plot.spectra(dense, plan, stats, ax=left)
    whole = (sum(p.numel() for p in dense.parameters()), accuracy(dense, x_test, y_test))
    curves = {"weights only (SVD)": plain, "calibrated, in sequence": ours}
    plot.accuracy_against_size(curves, dense=whole, ax=right)
    plot.save_figure(right, args.out / "quickstart.png")
    print(f"saved {args.out / 'small.safetensors'} and the plot {args.out / 'quickstart.png'}")


if __name__ == "__main__":
    main()
