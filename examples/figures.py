"""Draw what decompositions do to a matrix, a tensor and a picture: one figure per line.

python examples/figures.py [--image FILE] [--restarts 10] [--dark] [--out figures_out]

The matrix, the tensor and the non-negative matrix are small random ones; the picture is read from ../shared/data unless
another is given. The figures go into a folder as PNG files. Needs the extra plot, with which Pillow comes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from image_svd import DATA, read
from matplotlib.figure import Figure
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers import plot


def figures(picture: Tensor, restarts: int) -> dict[str, Callable[[], Figure]]:
    """Each figure by its name, with the line that draws it."""
    torch.manual_seed(42)
    matrix, tensor, positive = torch.rand(10, 8), torch.randn(6, 8, 5) * 2 + 1, torch.abs(torch.randn(12, 10)) + 0.1

    def nmf(rank: int) -> list[lr.NMF]:
        return [lr.nmf(positive, rank, init="random", seed=seed) for seed in range(restarts)]

    def cp(rank: int) -> list[lr.CP]:
        return [lr.cp(tensor, rank, init="random", starts=1, seed=seed) for seed in range(restarts)]

    return {
        "singular_values": lambda: plot.singular_values(matrix, lr.Energy(0.95)),
        "approximation": lambda: plot.approximation(matrix, lr.svd(matrix, 3)),
        "error_of_svd": lambda: plot.error_against_rank(matrix, {"SVD": [lr.svd(matrix, r) for r in range(1, 9)]}),
        "picture": lambda: plot.image_strip(
            {"original": picture} | {f"rank {r}": lr.svd(picture, r).to_dense() for r in (5, 10, 20, 50)}
        ),
        "spectrum_of_picture": lambda: plot.singular_values(picture, lr.Energy(0.999)),
        "tucker": lambda: plot.tensor_scatter(tensor, lr.tucker(tensor, (3, 4, 3))),
        "cp": lambda: plot.tensor_scatter(tensor, lr.cp(tensor, 3)),
        "cp_factors": lambda: plot.cp_factors(lr.cp(tensor, 3)),
        "error_of_cp": lambda: plot.error_against_rank(tensor, {"CP": [lr.cp(tensor, r) for r in range(1, 7)]}),
        "nmf_factors": lambda: plot.nmf_factors(positive, lr.nmf(positive, 3)),
        "error_of_nmf": lambda: plot.error_against_rank(positive, {"NMF": [lr.nmf(positive, r) for r in (2, 3, 4, 6)]}),
        "stability_of_nmf": lambda: plot.stability_against_rank(positive, {r: nmf(r) for r in range(2, 7)}),
        "stability_of_cp": lambda: plot.stability_against_rank(tensor, {r: cp(r) for r in range(1, 5)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=DATA / "nmf" / "Datawhale.jpg")
    parser.add_argument("--restarts", type=int, default=10, help="random starts per rank, for the stability")
    parser.add_argument("--dark", action="store_true", help="draw on a dark ground")
    parser.add_argument("--out", type=Path, default=Path("figures_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.style.context("dark_background" if args.dark else "default"):
        for name, draw in figures(read(args.image, 256, "L"), args.restarts).items():
            figure = draw()
            plot.save_figure(figure, args.out / f"{name}.png")
            plt.close(figure)
            print(f"written: {args.out / name}.png")


if __name__ == "__main__":
    main()
