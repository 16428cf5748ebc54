"""Lesson 8: an optimizer whose memory is low-rank.

python examples/08_optimizer.py [--rank 16] [--epochs 10] [--out DIR]

AdamW keeps two numbers for each parameter. LowRankProjection (GaLore) gives any optimizer gradients projected to few
directions, so that it keeps as little; the weights themselves stay dense and are trained in all directions in turn.
"""

from __future__ import annotations

import copy

import torch
from course import begin, lesson, save
from digits import accuracy, digits, train
from torch import nn
from torch.optim import AdamW

import lowrank_layers as lr
from lowrank_layers import plot


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer keeps between steps."""
    if isinstance(optimizer, lr.LowRankProjection):
        return optimizer.state_bytes()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


def main() -> None:
    parser = lesson(__doc__, epochs=10)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    start = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    ways = {
        "AdamW": lambda model: AdamW(model.parameters(), lr=1e-3),
        f"AdamW at rank {args.rank}": lambda model: lr.LowRankProjection(
            AdamW(model.parameters(), lr=1e-3), args.rank, refresh=50
        ),
    }
    curves, rows = {}, []
    for label, make in ways.items():
        model = copy.deepcopy(start)
        optimizer = make(model)
        curves[label] = train(model, x, y, epochs=args.epochs, optimizer=optimizer, label=label)
        rows.append((label, state_bytes(optimizer), accuracy(model.eval(), x_test, y_test)))

    print(f"\n{sum(p.nbytes for p in start.parameters()):,} bytes of parameters\n")
    print(f"{'':20}{'optimizer keeps':>20}{'read correctly':>18}")
    for label, kept, right in rows:
        print(f"{label:20}{kept:>14,} bytes{right:>16.1f} %")
    save(plot.losses(curves), args.out / "08_optimizer.png")


if __name__ == "__main__":
    main()
