"""Time and error of decompositions, beside tensorly, torch and scikit-learn on the same tensors."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import lowrank_layers as lr

from . import data
from .common import arguments, machine, markdown_table, paired_times, write_result

HEAD = ["tensor", "who", "seconds", "relative error", "speed-up", "error / theirs"]
SQUEEZENET = "squeezenet/squeezenet1_1_imagenet_fp16.safetensors"
Row = list[object]


def synthetic_kernel(channels: int, *, noise: float = 0.134, seed: int = 0) -> Tensor:
    """A sum of ``channels / 4`` separable components of decaying size, and white noise: ``[channels, channels, 3, 3]``.

    With this noise, ranks 1/4 leave a Tucker error of 0.126 at 512 channels.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = channels // 4
    factors = [torch.randn(n, rank, generator=generator) for n in (channels, channels, 3, 3)]
    units = [factor / torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    signal = torch.einsum("r,or,ir,hr,wr->oihw", torch.arange(1, rank + 1) ** -0.5, *units)
    white = torch.randn(signal.shape, generator=generator)
    return signal / torch.linalg.vector_norm(signal) + noise * white / torch.linalg.vector_norm(white)


def squeezenet_kernels(count: int) -> dict[str, Tensor]:
    """The largest trained 3 x 3 kernels of SqueezeNet 1.1."""
    from safetensors.torch import load_file

    state = load_file(data.ROOT / SQUEEZENET)
    kernels = {name: weight.float() for name, weight in state.items() if weight.shape[2:] == (3, 3)}
    names = sorted(kernels, key=lambda name: -kernels[name].numel())[:count]
    return {name.removesuffix(".weight"): kernels[name] for name in names}


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def dense_error(dense: Tensor, kernel: Tensor) -> float:
    kernel = kernel.double()
    return float(torch.linalg.vector_norm(kernel - dense.double()) / torch.linalg.vector_norm(kernel))


def against(tensor: str, who: str, ours: tuple[float, float], theirs: tuple[float, float]) -> Row:
    """A row with our seconds and error, and both relative to the peer."""
    speed, error = theirs[0] / ours[0], ours[1] / theirs[1]
    return [tensor, who, f"{ours[0]:.3f}", f"{ours[1]:.5f}", f"{speed:.1f}x", f"{error:.4f}"]


def alone(tensor: str, who: str, found: tuple[float, float]) -> Row:
    return [tensor, who, f"{found[0]:.3f}", f"{found[1]:.5f}", "", ""]


def tucker_rows(name: str, kernel: Tensor, *, rounds: int) -> list[Row]:
    """Tucker-2 at a quarter of the channels, with the default settings of both; medians of paired runs."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    ranks = (kernel.shape[0] // 4, kernel.shape[1] // 4)

    def peer() -> tuple[Any, Any]:
        return partial_tucker(kernel, rank=list(ranks), modes=[0, 1])

    def own() -> lr.Tucker:
        return lr.tucker(kernel, (*ranks, None, None))

    times = paired_times([peer, own], rounds=rounds, device=kernel.device.type)
    (core, factors), _ = peer()
    dense = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    theirs, ours = (times[0], dense_error(dense, kernel)), (times[1], own().relative_error(kernel))
    label = f"{name} {tuple(kernel.shape)}, Tucker-2 {ranks}"
    return [alone(label, "tensorly `partial_tucker`", theirs), against(label, "`tucker`", ours, theirs)]


def parafac(kernel: Tensor, rank: int, sweeps: int) -> tuple[float, float]:
    """Seconds and relative error of one run of tensorly's ``parafac``, after a small warm-up."""
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend("pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorly warns that the rank is above the kernel's height and width
        parafac(kernel[:8, :8].contiguous(), 4, n_iter_max=1)
        taken, found = seconds(lambda: parafac(kernel, rank, n_iter_max=sweeps, random_state=0))
    return taken, dense_error(tensorly.cp_to_tensor(found), kernel)


def cp_rows(name: str, kernel: Tensor, rank: int, *, sweeps: int, ladder: list[int]) -> list[Row]:
    """CP with as many sweeps as tensorly, with the fewest of ``ladder`` that reach its error, and with the defaults.

    tensorly runs once, since a sweep takes seconds; ours is the median of three.
    """
    theirs = parafac(kernel, rank, sweeps)

    def own(**settings: int) -> tuple[float, float]:
        lr.cp(kernel[:8, :8], 4)
        runs = [seconds(lambda: lr.cp(kernel, rank, **settings)) for _ in range(3)]
        return median(taken for taken, _ in runs), runs[0][1].relative_error(kernel)

    label = f"{name} {tuple(kernel.shape)}, CP {rank}"
    rows = [alone(label, f"tensorly `parafac`, {sweeps} sweeps, one run", theirs)]
    rows.append(against(label, f"`cp`, one start, {sweeps} sweeps", own(sweeps=sweeps, starts=1), theirs))
    for count in ladder:
        found = own(sweeps=count)
        if found[1] <= theirs[1]:
            rows.append(against(label, f"`cp`, {count} sweeps: the first with no more error", found, theirs))
            break
    else:
        rows.append([label, f"`cp` does not reach that error in {ladder[-1]} sweeps", "", "", "", ""])
    rows.append(against(label, "`cp`, its defaults", own(), theirs))
    return rows


def svd_rows(shape: tuple[int, int], rank: int, *, rounds: int, device: str) -> list[Row]:
    """Truncated SVD of a matrix with singular values ``1 / sqrt(k)``, a slow decay that is hard to truncate."""
    from sklearn.utils.extmath import randomized_svd

    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator)).Q
    matrix = (left * torch.arange(1, min(shape) + 1) ** -0.5) @ right.mT
    array = matrix.numpy()
    matrix = matrix.to(device)

    def exact() -> lr.SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return lr.SVD(u[:, :rank], s[:rank], vh[:rank])

    def sklearn() -> lr.SVD:
        u, s, vh = randomized_svd(array, rank, random_state=0)
        return lr.SVD(*(torch.from_numpy(x.copy()) for x in (u, s, vh)))

    runs: dict[str, Callable[[], lr.SVD]] = {"`torch.linalg.svd`": exact}
    for method in ("exact", "gram", "randomized", "auto"):
        runs[f'`svd`, method="{method}"'] = lambda method=method: lr.svd(matrix, rank, method=method)
    times = paired_times(list(runs.values()), rounds=rounds, device=device)
    # apart: numpy's threads keep spinning after a call and would slow down whoever comes next
    runs["scikit-learn `randomized_svd`"] = sklearn
    times += paired_times([sklearn], rounds=rounds)
    errors = [run().relative_error(matrix.cpu() if run is sklearn else matrix) for run in runs.values()]
    found = list(zip(times, errors, strict=True))
    label = f"{shape[0]}x{shape[1]}, SVD {rank}"
    return [against(label, who, each, found[0]) for who, each in zip(runs, found, strict=True)]


def run(args: argparse.Namespace) -> str:
    rounds = 1 if args.smoke else 5
    channels, sweeps = (32, 2) if args.smoke else (512, 5)
    ladder = [1, 2, 5] if args.smoke else [2, 5, 10, 20, 50, 200]
    rows: list[Row] = []
    kernels = {"synthetic": synthetic_kernel(channels)}
    if available := data.available(SQUEEZENET):
        kernels.update(squeezenet_kernels(1 if args.smoke else 2))
    kernels = {name: kernel.to(args.device) for name, kernel in kernels.items()}
    for name, kernel in kernels.items():
        rows += tucker_rows(name, kernel, rounds=rounds)
    for name, kernel in kernels.items():
        if name == "synthetic":
            rows += cp_rows(name, kernel, channels // 2, sweeps=sweeps, ladder=ladder)
        elif not args.smoke:
            rows += cp_rows(name, kernel, kernel.shape[0] // 2, sweeps=10 * sweeps, ladder=ladder)
    rows += svd_rows(
        (64, 32) if args.smoke else (2048, 512), 8 if args.smoke else 32, rounds=rounds, device=args.device
    )
    notes = [
        "Speed-up and error are relative to the peer above (SVD: to `torch.linalg.svd`).",
        "tensorly's `parafac` starts from its default (SVD) and is stopped after the sweeps in the table, because one"
        " takes seconds on the synthetic kernel; more of them would lower its error.",
        "" if available else "SqueezeNet's kernels were not there and are left out.",
    ]
    return f"{markdown_table(HEAD, rows)}\n\n{' '.join(filter(None, notes))}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny tensors, seconds")
    args = parser.parse_args()
    text = f"# Decompositions\n\n{machine(args, 'tensorly', 'scikit-learn')}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'decompose', text)}")


if __name__ == "__main__":
    main()
