"""Compress and denoise a picture by its singular values, and its colours by Tucker.

python examples/image_svd.py [--image FILE] [--size 256] [--ranks 5 10 20 50] [--noise 10 25 50] [--out image_svd_out]

Prints how much of the energy each rank keeps, the error in colour at the same number of stored values, and how many
decibels the rank chosen by Gavish and Donoho takes off noise of known size; the pictures go into a folder. The
picture is read from ../shared/data unless another is given. Needs the extra plot, with which Pillow comes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers import plot

DATA = Path(os.environ.get("LOWRANK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def read(path: Path, size: int, mode: str) -> Tensor:
    """Reads a picture as values from 0 to 1: ``[size, size]`` for mode ``"L"``, ``[size, size, 3]`` for ``"RGB"``."""
    from PIL import Image

    with Image.open(path) as picture:
        resized = picture.convert(mode).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return pixels.reshape(size, size, *([3] if mode == "RGB" else [])).float() / 255


def psnr(image: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, of values cut to the range from 0 to 1."""
    return float(-10 * (image.clamp(0, 1) - exact).square().mean().log10())


def compress(grey: Tensor, ranks: list[int]) -> list[tuple[str, Tensor]]:
    """Prints energy, stored values and PSNR per rank; returns the pictures."""
    energies = torch.linalg.svdvals(grey.double()).square().cumsum(0)
    print(f"{'rank':>6}{'energy':>10}{'values':>10}{'of all':>9}{'PSNR, dB':>11}")
    pictures = [("exact", grey)]
    for rank in ranks:
        found = lr.svd(grey, rank)
        kept, share = float(energies[found.rank - 1] / energies[-1]), found.numel() / grey.numel()
        print(f"{rank:6}{kept:10.4f}{found.numel():10,}{share:9.1%}{psnr(found.to_dense(), grey):11.2f}")
        pictures.append((f"rank {rank}: {kept:.2%}", found.to_dense()))
    return pictures


def colour(image: Tensor, ranks: list[int]) -> list[tuple[str, Tensor]]:
    """Prints the error of one Tucker decomposition beside one SVD per colour with at least as many values."""
    print(f"\n{'Tucker':>14}{'values':>10}{'error':>9}{'SVD per colour':>18}{'values':>10}{'error':>9}")
    pictures = [("exact", image)]
    size = image.shape[0]
    for rank in ranks:
        together = lr.tucker(image, (rank, rank, 3))
        each = -(-together.numel() // (3 * (2 * size + 1)))
        apart = torch.stack([lr.svd(image[..., k], each).to_dense() for k in range(3)], -1)
        error = float(torch.linalg.vector_norm(apart - image) / torch.linalg.vector_norm(image))
        print(
            f"{f'({rank}, {rank}, 3)':>14}{together.numel():10,}{together.relative_error(image):9.4f}"
            f"{f'rank {each}':>18}{3 * each * (2 * size + 1):10,}{error:9.4f}"
        )
        pictures.append((f"Tucker ({rank}, {rank}, 3)", together.to_dense()))
    return pictures


def denoise(grey: Tensor, levels: list[float]) -> list[tuple[str, Tensor]]:
    """Prints the PSNR before and after for noise of these sizes, of 255; the rule is not told how large it is."""
    print(f"\n{'noise':>6}{'PSNR, dB':>11}{'rank':>7}{'PSNR, dB':>11}{'best rank':>12}{'PSNR, dB':>11}")
    pictures = []
    generator = torch.Generator().manual_seed(0)
    for level in levels:
        noisy = grey + level / 255 * torch.randn(grey.shape, generator=generator)
        found = lr.svd(noisy, lr.GavishDonoho())
        whole = lr.svd(noisy)
        scores = [psnr(whole.truncate(rank).to_dense(), grey) for rank in range(1, min(grey.shape) + 1)]
        best = max(range(len(scores)), key=scores.__getitem__)
        before, after = psnr(noisy, grey), psnr(found.to_dense(), grey)
        print(f"{level:6g}{before:11.2f}{found.rank:7}{after:11.2f}{best + 1:12}{scores[best]:11.2f}")
        pictures.append((f"noise {level:g}: {before:.1f} dB", noisy))
        pictures.append((f"rank {found.rank}: {after:.1f} dB", found.to_dense()))
    return pictures


def save(pictures: list[tuple[str, Tensor]], path: Path) -> None:
    """Draws pictures side by side."""
    plot.save_figure(plot.image_strip(dict(pictures)), path)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=DATA / "nmf" / "Datawhale.jpg")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--noise", type=float, nargs="+", default=[10, 25, 50], help="standard deviations, of 255")
    parser.add_argument("--out", type=Path, default=Path("image_svd_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    grey = read(args.image, args.size, "L")
    save(compress(grey, args.ranks), args.out / "ranks.png")
    save(colour(read(args.image, args.size, "RGB"), args.ranks), args.out / "colour.png")
    save(denoise(grey, args.noise), args.out / "denoised.png")


if __name__ == "__main__":
    main()
