"""What all lessons share: their options, and where their pictures go."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lowrank_layers import plot


def lesson(doc: str | None, epochs: int | None = None) -> argparse.ArgumentParser:
    """The options of a lesson; those that train on the digits say for how many epochs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for what is written; by default a temporary one")
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, help=f"passes over the training data ({epochs})")
    return parser


def begin(args: argparse.Namespace) -> None:
    """Makes the folder of the pictures, and what is random repeatable."""
    args.out = Path(tempfile.mkdtemp(prefix="lowrank_layers_")) if args.out is None else args.out
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)


def save(figure: Figure, path: Path) -> None:
    """Saves a picture and says where."""
    plot.save_figure(figure, path)
    print(f"picture: {path}")
