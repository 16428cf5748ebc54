"""Lesson 1: define a low-rank model as one defines any other, and train it beside its dense twin.

python examples/01_define.py [--epochs 30] [--out DIR]

A low-rank layer takes the arguments of its counterpart in torch.nn, and a rank. It is an ordinary module: any optimizer
trains it.
"""

from __future__ import annotations

from course import begin, lesson, save
from digits import accuracy, build, digits, train
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot


class Small(nn.Module):
    """The CNN of this course, its three large layers low-rank from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = lr.TuckerConv2d(32, 64, 3, padding=1, rank=(12, 12))
        self.fc1 = lr.LowRankLinear(256, 128, rank=8)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def main() -> None:
    args = lesson(__doc__, epochs=30).parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    dense, small = build(), Small()
    print(f"{small}\n")

    curves = {
        "dense": train(dense, x, y, epochs=args.epochs, label="dense"),
        "low-rank": train(small, x, y, epochs=args.epochs, label="low-rank"),
    }
    print("\nBoth were trained from random weights, with the same optimizer for the same number of steps.\n")
    score = {"digits read correctly, %": lambda model: accuracy(model, x_test, y_test)}
    print(lr.compare(dense.eval(), small.eval(), [(x_test[:64], y_test[:64])], score=score))
    print(f"\nThe weight of a low-rank layer is the product of its factors: {tuple(small.fc1.weight.shape)}, of rank")
    print(f"{small.fc1.rank}; it holds {sum(p.numel() for p in small.fc1.parameters()):,} numbers.")
    save(plot.losses(curves), args.out / "01_define.png")


if __name__ == "__main__":
    main()
