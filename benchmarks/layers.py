"""Forward time of each factored layer, beside dense torch.nn, tensorly-torch and the ratio of MACs."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, paired_times, write_result

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CONVS = [(1, 128, 56), (8, 64, 32), (1, 256, 28), (1, 512, 14)]
LINEARS = [
    (4096, torch.float32, 1),
    (4096, torch.float32, 256),
    (1024, torch.float32, 1),
    (1024, torch.bfloat16, 1),
]
DIVISORS = [2, 4, 8, 16]
Forward = Callable[[], object]


def times(forwards: Sequence[Forward], args: argparse.Namespace) -> list[float]:
    """Median seconds of one call per function; they take turns, and short calls are repeated."""
    least = 0.002 if args.smoke else 0.02
    once = paired_times(forwards, rounds=1, device=args.device)
    counts = [max(1, math.ceil(least / seconds)) for seconds in once]

    def repeat(forward: Forward, count: int) -> None:
        for _ in range(count):
            forward()

    repeated = [partial(repeat, forward, count) for forward, count in zip(forwards, counts, strict=True)]
    taken = paired_times(repeated, rounds=3 if args.smoke else 15, device=args.device)
    return [total / count for total, count in zip(taken, counts, strict=True)]


def our_convs(dense: nn.Conv2d) -> dict[str, nn.Module]:
    c = dense.out_channels
    layers = {
        f"LowRankConv2d, r = C/4 = {c // 4}": lr.LowRankConv2d.like(dense, rank=c // 4),
        f"TuckerConv2d, ranks C/4 = {c // 4}": lr.TuckerConv2d.like(dense, rank=c // 4),
        f"CPConv2d, R = C/2 = {c // 2}": lr.CPConv2d.like(dense, rank=c // 2),
    }
    for layer in layers.values():
        layer.reset_parameters()
    return layers


def their_convs(dense: nn.Conv2d) -> dict[str, nn.Module | str]:
    """tensorly-torch's Tucker and CP convolutions in both its implementations, or the name of the exception raised."""
    from tltorch import FactorizedConv

    c, kernel = dense.out_channels, tuple(dense.kernel_size)
    found: dict[str, nn.Module | str] = {}
    for factorization, rank in (("tucker", (c // 4, c // 4, *kernel)), ("cp", c // 2)):
        for implementation in ("factorized", "reconstructed"):
            # values do not change the time: no need to wait for the decomposition
            make = partial(
                FactorizedConv.from_conv,
                dense,
                rank=rank,
                factorization=factorization,
                implementation=implementation,
                decompose_weights=False,
            )
            label = f"tensorly-torch {factorization}, {implementation}"
            try:
                found[label] = make().to(dense.weight.device)
            except Exception as error:
                found[label] = type(error).__name__
    return found


def both_formats(label: str, layer: nn.Module, input: Tensor) -> dict[tuple[str, str], Forward]:
    """The forward pass in both memory formats, with the weights copied to each."""
    return {
        (label, name): partial(copy.deepcopy(layer).to(memory_format=form), input.to(memory_format=form))
        for name, form in FORMATS.items()
    }


def conv_rows(batch: int, channels: int, size: int, args: argparse.Namespace) -> list[list[object]]:
    dense = nn.Conv2d(channels, channels, 3, padding=1, device=args.device).eval()
    input = torch.randn(batch, channels, size, size, device=args.device)
    ours, theirs = our_convs(dense), their_convs(dense)
    forwards = both_formats("nn.Conv2d", dense, input)
    failed: dict[str, str] = {}
    for label, layer in {**ours, **theirs}.items():
        try:
            if isinstance(layer, str):
                failed[label] = layer
                continue
            candidates = both_formats(label, layer, input)
            for forward in candidates.values():
                forward()
            forwards.update(candidates)
        except Exception as error:
            if label in ours:
                raise
            failed[label] = type(error).__name__
    taken = dict(zip(forwards, times(list(forwards.values()), args), strict=True))
    best = {}
    for (label, form), seconds in taken.items():
        if label not in best or seconds < best[label][0]:
            best[label] = (seconds, form)

    shape = f"{batch}x{channels}x{size}²"
    base, form = best["nn.Conv2d"]
    rows: list[list[object]] = [[shape, "nn.Conv2d", f"{1000 * base:.2f}", form, "1.00", ""]]
    sample = (channels, size, size)
    macs = lr.layer_cost(dense, sample).macs
    for label in [*ours, *theirs]:
        if label in failed:
            rows.append([shape, label, failed[label], "", "", ""])
            continue
        seconds, form = best[label]
        ideal = f"{macs / lr.layer_cost(ours[label], sample).macs:.2f}" if label in ours else ""
        rows.append([shape, label, f"{1000 * seconds:.2f}", form, f"{base / seconds:.2f}", ideal])
    return rows


def linear_row(width: int, dtype: torch.dtype, batch: int, args: argparse.Namespace) -> list[object]:
    dense = nn.Linear(width, width, device=args.device, dtype=dtype)
    input = torch.randn(batch, width, device=args.device, dtype=dtype)
    layers = [dense, *(lr.LowRankLinear.like(dense, rank=width // d) for d in DIVISORS)]
    for layer in layers[1:]:
        layer.reset_parameters()
    taken = times([partial(layer, input) for layer in layers], args)
    cost = [lr.layer_cost(layer).bytes for layer in layers]
    cells = [f"{taken[0] / t:.2f} ({cost[0] / c:.1f})" for t, c in zip(taken[1:], cost[1:], strict=True)]
    return [f"{width}² {str(dtype).removeprefix('torch.')}, batch {batch}", f"{1e6 * taken[0]:.0f}", *cells]


@torch.inference_mode()
def run(args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    convs = [(1, 16, 8)] if args.smoke else CONVS
    linears = [(64, dtype, batch) for _, dtype, batch in LINEARS] if args.smoke else LINEARS
    conv_table = markdown_table(
        ["input", "layer", "ms", "memory format", "speed-up", "MACs saved"],
        [row for shape in convs for row in conv_rows(*shape, args)],
    )
    linear_table = markdown_table(
        ["nn.Linear", "dense, us", *(f"r = min/{d}" for d in DIVISORS)],
        [linear_row(*case, args) for case in linears],
    )
    return "\n\n".join(
        [
            "## 3x3 convolutions",
            "Each layer in the faster of its two memory formats; speed-up over `nn.Conv2d` in its faster one.",
            conv_table,
            "## LowRankLinear",
            "Speed-up over `nn.Linear`; in brackets the ideal, the ratio of weight bytes (and MACs). Calls repeat with"
            " the same weights: factors that fit into a cache that the dense weight overflows beat the ideal.",
            linear_table,
        ]
    )


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    args = parser.parse_args()
    text = f"# Layers\n\n{machine(args, 'tensorly', 'tensorly-torch')}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'layers', text)}")


if __name__ == "__main__":
    main()
