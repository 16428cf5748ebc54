"""Error and time of CP's defaults beside those of tensorly's ``parafac``: published, random and trained tensors."""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import lowrank_layers as lr

from . import data
from .common import arguments, machine, markdown_table, paired, write_result
from .decompose import SQUEEZENET, Row, dense_error, squeezenet_kernels

HEAD = ["tensors", "number", "ours above theirs", "error / theirs", "most", "tensorly, s", "`cp`, s", "`cp` / tensorly"]
Case = tuple[Tensor, int]


def published() -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the published tables, drawn in this order: for SVD, for CP and Tucker, and for NMF."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        return torch.rand(10, 8), torch.randn(6, 8, 5) * 2 + 1, torch.abs(torch.randn(12, 10)) + 0.1


def random_case(seed: int) -> Case:
    """Noise of three or four modes, and a rank from 2 to 6."""
    draw = torch.Generator().manual_seed(seed)
    modes = int(torch.randint(3, 5, (), generator=draw))
    shape = torch.randint(3, 9, (modes,), generator=draw).tolist()
    rank = int(torch.randint(2, 7, (), generator=draw))
    return torch.randn(shape, generator=draw), rank


def groups(*, smoke: bool) -> Iterator[tuple[str, list[Case]]]:
    """The tensors and their ranks by origin."""
    yield "published, CP 2 to 5", [(published()[1], rank) for rank in (2, 3, 4, 5)]
    yield "random, CP 2 to 6", [random_case(seed) for seed in range(2 if smoke else 50)]
    if data.available("cifar_resnet") and not smoke:
        weights = [weight.detach() for weight in data.resnet20().parameters() if weight.ndim == 4]
        yield "3 x 3 kernels of ResNet-20, CP 16", [(weight, 16) for weight in weights]
    if data.available(SQUEEZENET) and not smoke:
        yield "3 x 3 kernels of SqueezeNet, CP 16", [(weight, 16) for weight in squeezenet_kernels(8).values()]


def rows(name: str, cases: list[Case], *, rounds: int) -> list[Row]:
    """One row per backend of tensorly: errors, and CPU seconds over all tensors of the group."""
    import tensorly
    from tensorly.decomposition import parafac

    found: list[Row] = []
    for backend in ("pytorch", "numpy"):
        errors, theirs, ours = [], 0.0, 0.0
        with tensorly.backend_context(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorly warns where the rank is above a mode
            for tensor, rank in cases:
                given = tensor.numpy() if backend == "numpy" else tensor
                peer = partial(parafac, given, rank, random_state=0)
                own = partial(lr.cp, tensor, rank)
                seconds, _ = paired([peer, own], rounds)
                theirs, ours = theirs + seconds[0], ours + seconds[1]
                dense = torch.as_tensor(tensorly.cp_to_tensor(peer()))
                errors.append(own().relative_error(tensor) / dense_error(dense, tensor))
        above = sum(error > 1 + 1e-6 for error in errors)
        middle, most = statistics.median(errors), max(errors)
        times = f"{theirs:.3f}", f"{ours:.3f}", f"{ours / theirs:.2f}"
        found.append([f"{name}; {backend}", len(cases), above, f"{middle:.6f}", f"{most:.6f}", *times])
    return found


def run(args: argparse.Namespace) -> str:
    rounds = 1 if args.smoke else 3
    table = [row for name, cases in groups(smoke=args.smoke) for row in rows(name, cases, rounds=rounds)]
    notes = (
        "Both with their defaults; tensorly's `parafac` with each of two backends, its random numbers seeded with 0."
        " Seconds are CPU time over all tensors of the row, medians of paired runs. Above: by more than 1e-6, the"
        " rounding of fp32."
    )
    return f"{markdown_table(HEAD, table)}\n\n{notes}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--smoke", action="store_true", help="few tensors, seconds")
    args = parser.parse_args()
    text = f"# CP\n\n{machine(args, 'tensorly')}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'cp', text)}")


if __name__ == "__main__":
    main()
