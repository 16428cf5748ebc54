"""What SpectrumMonitor costs in training: measurements of weights and gradients every 50 optimizer steps.

A character model (a causal transformer, AdamW) is trained with and without the monitor, in turns of 50 steps each; the
overhead is the median of the ratios of CPU seconds. Because that ratio is noisy, the mean time of these measurements
is also divided by that of 50 steps. Accuracy is the largest relative error of a leading singular
value against ``torch.linalg.svdvals``, over all weights and gradients of the last measurement. It takes two minutes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result

EVERY = 50
LIMIT = 0.02


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    width: int
    depth: int
    batch: int
    length: int


FULL = (Size(128, 4, 8, 64), Size(256, 6, 8, 64))
SMOKE = (Size(32, 1, 4, 16),)


class Characters(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(256, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, 4, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, 256)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        out: Tensor = self.head(self.blocks(self.table(text), mask, is_causal=True))
        return out


class Run:
    """A model in training; the data is a Markov chain, so that there is something to learn."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.model = Characters(size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.measured: list[float] = []
        self.chain = torch.randint(256, (256, 4))

    def step(self) -> None:
        text = torch.randint(256, (self.size.batch, 1))
        for _ in range(self.size.length):
            text = torch.cat([text, self.chain[text[:, -1:], torch.randint(4, (len(text), 1))]], 1)
        text = text.to(self.device)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        self.optimizer.step()

    def seconds(self, steps: int, monitored: bool) -> float:
        """CPU seconds of that many steps; wall-clock seconds on a GPU."""
        start = self.clock()
        with self.monitor if monitored else contextlib.nullcontext():
            self.train(steps)
        return self.clock() - start

    def clock(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed_monitor(self, every: int) -> lr.SpectrumMonitor:
        """A monitor whose measurements are timed."""
        monitor = lr.SpectrumMonitor(self.model, every=every)
        measure = monitor.measure

        def timed() -> None:
            start = self.clock()
            measure()
            self.measured.append(self.clock() - start)

        monitor.measure = timed  # type: ignore[method-assign, assignment]
        return monitor

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def compare(self, pairs: int, steps: int) -> tuple[float, float, float]:
        """Seconds of a step and of a measurement, and the overhead of the monitor when training in turns."""
        self.monitor = self.timed_monitor(steps)
        self.train(3)
        ratios, plain = [], []
        for pair in range(pairs):
            order = (False, True) if (pairs - pair) % 2 else (True, False)  # the last turn ends with a measurement
            taken = {monitored: self.seconds(steps, monitored) for monitored in order}
            ratios.append(taken[True] / taken[False])
            plain.append(taken[False] / steps)
        return statistics.mean(plain), statistics.mean(self.measured), statistics.median(ratios) - 1

    def worst_error(self) -> float:
        """The largest relative error of a singular value in the last record."""
        record, parameters = self.monitor.records[-1], dict(self.model.named_parameters())
        worst = 0.0
        for kind in ("weights", "gradients"):
            for name, spectrum in getattr(record, kind).items():
                matrix = parameters[name] if kind == "weights" else parameters[name].grad
                exact = torch.linalg.svdvals(matrix.detach().double())[: len(spectrum.singular_values)]
                errors = torch.tensor(spectrum.singular_values, dtype=exact.dtype) - exact.cpu()
                worst = max(worst, float((errors.abs() / exact.cpu()).max()))
        return worst


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--pairs", type=int, default=3, help="turns with and without the monitor")
    parser.add_argument("--smoke", action="store_true", help="one small model, few steps, no claims")
    args = parser.parse_args()
    line = machine(args)
    rows, failed = [], []
    for size in SMOKE if args.smoke else FULL:
        run = Run(size, args.device)
        step, measurement, overhead = run.compare(1 if args.smoke else args.pairs, 5 if args.smoke else EVERY)
        error, share = run.worst_error(), measurement / (EVERY * step)
        count = sum(parameter.numel() for parameter in run.model.parameters())
        cells = (f"{1e3 * step:.0f}", f"{1e3 * measurement:.0f}", f"{share:.2%}", f"{overhead:+.2%}", f"{error:.2%}")
        rows.append((f"{count:,}", f"{size.batch * size.length:,}", *cells))
        print(" | ".join(rows[-1]), flush=True)
        if error > 0.01 or share > LIMIT:
            failed.append(f"{count:,} parameters, {size.batch * size.length:,} tokens per step")
    head = ("parameters", "tokens per step", "step, ms", "measurement, ms", f"measurement / {EVERY} steps")
    head = (*head, "overhead, in turns", "worst error of a singular value")
    report = f"# Cost of SpectrumMonitor(every={EVERY})\n\n{line}; CPU time, weights and gradients, k=8\n\n"
    if args.smoke:
        failed = []
    verdict = "Above the limits: " + "; ".join(failed) if failed else f"Below {LIMIT:.0%} of the time and 1 % of error."
    report += markdown_table(head, rows) + ("" if args.smoke else f"\n\n{verdict}")
    print(f"written to {write_result(args, 'spectrum_monitor', report)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
