"""Pictures of measured results, drawn from the tables of benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure
from results import number, rows

from lowrank_layers import plot


def seed_lenet() -> Figure:
    """LeNet: the published rule beside plans."""
    published = rows("seed_lenet", "Published rule, all layers")
    heading = "Ours: make_plan(budget), then factorize_ with data, defaults; measured: make_plan with batches"
    ours = rows("seed_lenet", heading)
    curves = {
        "plain SVD, same ratio in every layer (published)": [
            (int(number(row["parameters"])), number(row["published accuracy"])) for row in published
        ],
        "lowrank_layers": [(int(number(row["parameters"])), number(row["ours"])) for row in ours],
    }
    figure = plot.accuracy_against_size(curves)
    figure.axes[0].set_title("LeNet on MNIST, no fine-tuning")
    return figure


def resnet_cifar() -> Figure:
    """ResNet-20: each setting at half and at 30 % of the parameters."""
    headings = ("50% of the parameters (bar 85.5 %)", "30% of the parameters (bar 66.0 %)")
    found = [row for heading in headings for row in rows("resnet_cifar", heading)]
    labels = {
        "plain, uniform, channel SVD": "plain SVD",
        "whitened, uniform, channel SVD": "whitened SVD, same ratio",
        "curvature, balanced, channel SVD": "planned, SVD only",
        "curvature, balanced, CP never": "planned, SVD and Tucker",
        "curvature, balanced, CP where it pays (default)": "planned, all methods (default)",
    }
    points: dict[str, dict[float, float]] = {label: {} for label in labels.values()}
    for row in found:
        if row["setting"] in labels:  # of two rows of a setting, sequential regression comes last
            points[labels[row["setting"]]][number(row["kept"])] = number(row["accuracy"])
    figure = plot.accuracy_against_size({label: sorted(each.items()) for label, each in points.items()})
    figure.axes[0].set(xscale="linear", xticks=[30, 50], xlabel="parameters kept, %")
    figure.axes[0].set_title("ResNet-20 on CIFAR-10, no fine-tuning")
    return figure


def vla() -> Figure:
    """A robot's policy: success against parameters."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows("vla", ""):
        label = row["policy"].partition(", ")[2] or "dense"
        points.setdefault(label, []).append((number(row["parameters"]), number(row["mean ± deviation"])))
    figure = plot.size_score_front(points, score="success, %")
    figure.axes[0].set_title("BabyAI: a policy under a device's limits")
    return figure


def kv_real() -> Figure:
    """Caches of SmolLM2: perplexity against bytes."""
    kinds = {
        "int2 and int4, KIVI's layout": "KIVI",
        "SnapKV": "SnapKV",
        "StreamingLLM": "StreamingLLM",
        "Palu-style": "Palu",
        "lowrank_layers, fitted to the prompt": "ours, fitted",
        "lowrank_layers, calibrated": "ours, calibrated on WikiText",
    }
    found = rows("kv_real", "WikiText, 2048 tokens of prompt")
    points = {
        label: [
            (number(row["KiB per sequence"]), number(row["perplexity, %"])) for row in found if kind in row["cache"]
        ]
        for label, kind in kinds.items()
    }
    figure = plot.size_score_front(
        {label: each for label, each in points.items() if each},
        higher_is_better=False,
        size="KiB per sequence",
        score="perplexity, % above that of the exact cache",
    )
    figure.axes[0].set_title("SmolLM2-135M on WikiText, 2,048 tokens of prompt")
    return figure


def projection() -> Figure:
    """Optimizers: held-out loss against the size of their state."""
    state, loss = "state, MiB (of AdamW's)", "held-out loss (lowest to highest seed)"
    points = {row["optimizer"]: [(number(row[state]), number(row[loss]))] for row in rows("projection", "")}
    figure = plot.size_score_front(points, higher_is_better=False, size="optimizer state, MiB", score="held-out loss")
    figure.axes[0].set_title("A small Llama on tinyshakespeare, 400 steps")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw for draw in (seed_lenet, resnet_cifar, vla, kv_real, projection)
}
"""A picture by the theme of the results that it shows."""
