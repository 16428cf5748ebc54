"""Time and objective of non-negative matrix factorization, beside scikit-learn on the same matrices."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

import lowrank_layers as lr

from . import data
from .common import arguments, machine, markdown_table, paired_times, write_result

HEAD = ["matrix, rank", "who", "seconds", "objective", "time / theirs", "objective / theirs"]
LADDER = [2, 5, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200]
PAIRS = [("hals", "frobenius", "cd"), ("mu", "frobenius", "mu"), ("mu", "kl", "mu")]
Row = list[object]


def objective(matrix: Tensor, f: lr.NMF, loss: str) -> float:
    """``||X - W H||^2 / 2`` or the generalized Kullback-Leibler divergence, in fp64."""
    x, model = matrix.double(), f.w.double() @ f.h.double()
    if loss == "frobenius":
        return float((x - model).square().sum()) / 2
    return float((torch.xlogy(x, x) - torch.xlogy(x, model) - x + model).sum())


def sklearn_nmf(array: np.ndarray | csr_matrix, rank: int, solver: str, loss: str) -> lr.NMF:
    from sklearn.decomposition import NMF

    name = {"frobenius": "frobenius", "kl": "kullback-leibler"}[loss]
    model = NMF(rank, solver=solver, beta_loss=name, init="nndsvda", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 200 sweeps, its default, were not enough
        w = model.fit_transform(array)
    return lr.NMF(torch.from_numpy(w), torch.from_numpy(model.components_))


def nmf_rows(name: str, matrix: Tensor, rank: int, pair: tuple[str, str, str], args: argparse.Namespace) -> list[Row]:
    """Both with their defaults, and ours with the fewest sweeps of the ladder that come within 1 % of scikit-learn."""
    solver, loss, peer = pair
    on_device, array = matrix.to(args.device), matrix.numpy()

    def own(**settings: float) -> lr.NMF:
        return lr.nmf(on_device, rank, solver=solver, loss=loss, **settings)

    def score(f: lr.NMF) -> float:
        return objective(matrix, lr.NMF(f.w.cpu(), f.h.cpu()), loss)

    theirs = score(sklearn_nmf(array, rank, peer, loss))
    bar = 1.01 * theirs
    enough = next((n for n in LADDER if score(own(sweeps=n, tolerance=0)) <= bar), None)
    runs: dict[str, Callable[[], lr.NMF]] = {
        f'scikit-learn, "{peer}"': lambda: sklearn_nmf(array, rank, peer, loss),
        f'`nmf`, "{solver}", its defaults': own,
    }
    if enough is not None:
        runs[f'`nmf`, "{solver}", {enough} sweeps: the first within 1 %'] = lambda: own(sweeps=enough, tolerance=0)
    if (array > 0).mean() < 0.1:
        sparse = csr_matrix(array)
        runs[f'scikit-learn, "{peer}", given a sparse matrix'] = lambda: sklearn_nmf(sparse, rank, peer, loss)
    times = paired_times(list(runs.values()), rounds=args.rounds, device=args.device)
    label = f"{name} {tuple(matrix.shape)}, {rank}, {loss}"
    rows: list[Row] = []
    for (who, run), seconds in zip(runs.items(), times, strict=True):
        found = score(run())
        ratios = [f"{seconds / times[0]:.2f}", f"{found / theirs:.4f}"] if rows else ["", ""]
        rows.append([label, who, f"{seconds:.3f}", f"{found:.5g}", *ratios])
    return rows


def matrices(smoke: bool) -> dict[str, Tensor]:
    if smoke:
        return {"digits": data.digits()[:100]}
    found = {"digits": data.digits()}
    if data.available("nmf"):
        found |= {"Olivetti faces": data.olivetti_faces(), "newsgroups": data.newsgroup_counts()}
    return found


def run(args: argparse.Namespace) -> str:
    from threadpoolctl import threadpool_limits

    found = matrices(args.smoke)
    with threadpool_limits(args.threads):
        rows = [
            row
            for name, matrix in found.items()
            for rank in ((4,) if args.smoke else (10, 40))
            for pair in PAIRS
            for row in nmf_rows(name, matrix, rank, pair, args)
        ]
    notes = [
        f"fp32, `nndsvda`; medians of {args.rounds} paired runs; times and objectives relative to scikit-learn's on"
        " the dense matrix, which ours is given too (its search for zeros is in its time).",
        "" if "newsgroups" in found else "Faces and newsgroups are left out.",
    ]
    return f"{markdown_table(HEAD, rows)}\n\n{' '.join(filter(None, notes))}"


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="a tiny matrix, seconds")
    parser.add_argument("--rounds", type=int, default=7, help="paired runs")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 1
    text = f"# Non-negative matrix factorization\n\n{machine(args, 'scikit-learn')}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'nmf', text)}")


if __name__ == "__main__":
    main()
