"""Spectra of weights, gradients and LoRA deltas, measured while a model is trained."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..checks import check_integer
from ..errors import LowRankError
from ..modules import Selector
from .json_lines import JsonLines
from .leading_spectrum import LeadingSpectrum, Triplets, leading_spectrum
from .monitor_curves import monitor_curves
from .monitored import monitored
from .optimizer_steps import EveryFewSteps, process_rank
from .record import Kind, SpectrumRecord
from .tensorboard import ScalarWriter, TensorBoard

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SpectrumMonitor(EveryFewSteps):
    """Measures the leading singular values of a model's matrices every few optimizer steps.

    Inside a ``with`` block it counts the steps of the optimizer that trains the model, by a hook on torch's optimizers;
    the model gets no hooks, so that a compiled one is not compiled again. Without a ``with`` block, call :meth:`step`
    after every step yourself. After step ``every``, ``2 every``, ... it measures the updated weights, the gradients of
    that step, and the deltas ``scaling B A`` of LoRA adapters.

    Singular values come from block power iteration that keeps its powers (a block Krylov space) and starts from the
    singular vectors of the measurement before. It ends at residuals ``||A v - s u|| <= 0.05 s``, by which they are
    within 2.5 % of singular values of the matrix; in measured training runs they are within 1 %.

    Measured are matrices and the kernels of convolutions, as ``[m, n * ...]``; the product of a low-rank layer, which
    has no gradient of its own; no stacks of matrices. With several processes only rank 0 measures and has records.
    Where parameters are sharded (FSDP2: DTensors) every rank gathers one matrix at a time for it, so all ranks need a
    monitor with the same settings.

    Args:
        model: the model, possibly compiled or wrapped in ``DistributedDataParallel``.
        every: number of optimizer steps between measurements.
        k: number of leading singular values per matrix.
        target: the layers to measure, or modules with all layers inside: full names, ends of names (``"mlp"``,
            ``"mlp.fc1"``), types, or predicates ``(name, module) -> bool``. By default, every weight that is trained,
            and every adapter.
        gradients: whether to measure gradients.
        keep: number of records in :attr:`records`, the last ones.
        callback: called with every record.
        file: a file of JSON lines to which every record is appended; :func:`read_spectra` reads it.
        tensorboard: a ``SummaryWriter``, or a folder for a new one.
        optimizer: the optimizer whose steps count; by default, the first that steps and trains a part of the model.

    Raises:
        LowRankError: for settings that are out of range, and for a model without a matrix to measure.
        MissingExtraError: for a folder as ``tensorboard``, if TensorBoard is not installed.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with lr.SpectrumMonitor(model, every=2, k=3) as monitor:
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 8)).square().mean().backward()
        ...         optimizer.step()
        >>> [record.step for record in monitor.records]
        [2, 4]
        >>> spectrum = monitor.records[-1].weights["0.weight"]
        >>> len(spectrum.singular_values), 1 <= spectrum.stable_rank <= 8
        (3, True)
        >>> sorted(monitor.records[-1].gradients)
        ['0.weight', '2.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        k: int = 8,
        target: Sequence[Selector] | None = None,
        gradients: bool = True,
        keep: int = 1000,
        callback: Callable[[SpectrumRecord], object] | None = None,
        file: str | os.PathLike[str] | None = None,
        tensorboard: ScalarWriter | str | os.PathLike[str] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__(model, every, optimizer)
        check_integer(k, "SpectrumMonitor", "k", 1)
        check_integer(keep, "SpectrumMonitor", "keep", 1)
        if callback is not None and not callable(callback):
            raise LowRankError(f"SpectrumMonitor: got callback={callback!r}, expected a function of a record.")
        if next(monitored(self.model, target, gradients=False), None) is None:
            raise LowRankError(
                "SpectrumMonitor: got a model, or target=, without a matrix that is trained; name layers with a weight,"
                " also frozen ones, as target=[...]."
            )
        self.k, self.target, self.gradients = k, target, gradients
        self._records: deque[SpectrumRecord] = deque(maxlen=keep)
        self._outputs: list[Callable[[SpectrumRecord], object]] = []
        if callback is not None:
            self._outputs.append(callback)
        if file is not None:
            self._outputs.append(JsonLines(file))
        if tensorboard is not None and process_rank() == 0:  # a SummaryWriter makes its file at once
            self._outputs.append(TensorBoard(tensorboard))
        self._starts: dict[tuple[str, str], Triplets | None] = {}

    @property
    def records(self) -> list[SpectrumRecord]:
        """The last ``keep`` records, oldest first; on ranks other than 0 there are none."""
        return list(self._records)

    @torch.no_grad()
    def measure(self) -> SpectrumRecord | None:
        """Measures now, and returns the record, which has gone to the file and the callbacks; None on other ranks."""
        found: dict[str, dict[str, LeadingSpectrum]] = {"weights": {}, "gradients": {}, "deltas": {}}
        starts: dict[tuple[str, str], Triplets | None] = {}
        for matrix in monitored(self.model, self.target, self.gradients):
            if process_rank() != 0:
                if matrix.sharded:
                    matrix.read()  # all ranks gather what one of them measures
                continue
            values = matrix.read()
            key = (matrix.kind, matrix.name)
            start = self._starts.get(key)
            if start is not None and (start[0].shape[0], start[2].shape[1]) != values.shape:
                start = None  # the layer was replaced
            found[matrix.kind][matrix.name], starts[key] = leading_spectrum(values, self.k, self.steps, start)
        if process_rank() != 0:
            return None
        self._starts = starts
        record = SpectrumRecord(self.steps, found["weights"], found["gradients"], found["deltas"])
        self._records.append(record)
        for output in self._outputs:
            output(record)
        return record

    def due(self) -> None:
        """Measures, as :meth:`measure`."""
        self.measure()

    def plot(self, kind: Kind = "weights", name: str | None = None) -> Figure:
        """Plots the records, as :func:`monitor_curves`.

        Args:
            kind: ``"weights"``, ``"gradients"`` or ``"deltas"``.
            name: a single matrix, of which all that was measured is drawn; ``None`` draws all matrices.

        Raises:
            LowRankError: if nothing of this kind or name was measured.
            MissingExtraError: if matplotlib is not installed.
        """
        return monitor_curves(self.records, kind, name)
