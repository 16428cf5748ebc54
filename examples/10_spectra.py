"""Lesson 10: look into a network through its singular values, while it is trained and afterwards.

python examples/10_spectra.py [--epochs 30] [--out DIR]

Every result prints as a table and has a method that plots it.
"""

from __future__ import annotations

from course import begin, lesson, save
from digits import accuracy, build, digits, train

import lowrank_layers as lr
from lowrank_layers import plot


def main() -> None:
    args = lesson(__doc__, epochs=30).parse_args()
    begin(args)
    x, y, x_test, y_test = digits()
    model = build()
    with lr.SpectrumMonitor(model, every=10) as monitor, lr.CheckpointRecorder(model, every=20) as recorder:
        train(model, x, y, epochs=args.epochs)
    model.eval()
    print(f"\n{accuracy(model, x_test, y_test):.1f} % of the test digits are read correctly.")

    batches = list(x.split(250))
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    weights, path = lr.weight_spectrum(model, stats), lr.trajectory_spectrum(recorder)
    activations, capacity = lr.activation_spectrum(model, batches), lr.capacity(model, batches)
    print(f"\nThe weights, and what of them matters to the loss:\n\n{weights}")
    for label, spectrum in (("by itself", weights["fc1"].raw), ("in the loss", weights["fc1"].weighted)):
        print(f"\nShould fc1 be factorized, {label}? {lr.should_factorize(spectrum)}")
    print(f"\nWhat layers give, on real digits:\n\n{activations}")
    print(f"\nFrom input to output:\n\n{capacity}")
    print(f"\nWhere training went:\n\n{path}\n")

    figures = {
        "weights": weights.plot(),
        "activations": activations.plot(),
        "capacity": capacity.plot(),
        "path": path.plot(),
        "training": monitor.plot(),
        "gradients": monitor.plot("gradients"),
        "matrix": plot.singular_values(model.fc1.weight.detach(), lr.Energy(0.95)),
    }
    for name, figure in figures.items():
        save(figure, args.out / f"10_{name}.png")


if __name__ == "__main__":
    main()
