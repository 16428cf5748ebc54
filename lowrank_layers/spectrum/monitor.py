"""Spectra of weights, gradients and LoRA deltas, measured while a model is trained."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..checks import check_integer
from ..errors import LowRankError
from ..modules import Selector
from ..trainer_callbacks import hf_callback, lightning_callback
from .json_lines import JsonLines
from .leading_spectrum import LeadingSpectrum, Triplets, leading_spectrum
from .monitored import monitored, unwrapped
from .record import SpectrumRecord
from .tensorboard import ScalarWriter, TensorBoard


class SpectrumMonitor:
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
        if not isinstance(model, nn.Module):
            raise LowRankError(f"SpectrumMonitor: got {type(model).__name__}, expected a torch.nn.Module.")
        for name, value in (("every", every), ("k", k), ("keep", keep)):
            check_integer(value, "SpectrumMonitor", name, 1)
        if callback is not None and not callable(callback):
            raise LowRankError(f"SpectrumMonitor: got callback={callback!r}, expected a function of a record.")
        self.model = unwrapped(model)
        if optimizer is not None and not (isinstance(optimizer, Optimizer) and self._is_trained_by(optimizer)):
            raise LowRankError(
                f"SpectrumMonitor: got optimizer={type(optimizer).__name__}, expected a torch optimizer that holds"
                " parameters of the model."
            )
        if next(monitored(self.model, target, gradients=False), None) is None:
            raise LowRankError(
                "SpectrumMonitor: got a model, or target=, without a matrix that is trained; name layers with a weight,"
                " also frozen ones, as target=[...]."
            )
        self.every, self.k, self.target, self.gradients, self.optimizer = every, k, target, gradients, optimizer
        self.steps = 0
        """Number of optimizer steps so far; set it when training is resumed."""
        self._records: deque[SpectrumRecord] = deque(maxlen=keep)
        self._outputs: list[Callable[[SpectrumRecord], object]] = []
        if callback is not None:
            self._outputs.append(callback)
        if file is not None:
            self._outputs.append(JsonLines(file))
        if tensorboard is not None and _rank() == 0:  # a SummaryWriter makes its file at once
            self._outputs.append(TensorBoard(tensorboard))
        self._starts: dict[tuple[str, str], Triplets | None] = {}
        self._counted: Optimizer | None = None
        self._hook: Any = None

    @property
    def records(self) -> list[SpectrumRecord]:
        """The last ``keep`` records, oldest first; on ranks other than 0 there are none."""
        return list(self._records)

    def step(self) -> None:
        """Counts an optimizer step and measures when it is time, for training without a ``with`` block."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.measure()

    @torch.no_grad()
    def measure(self) -> SpectrumRecord | None:
        """Measures now, and returns the record, which has gone to the file and the callbacks; None on other ranks."""
        found: dict[str, dict[str, LeadingSpectrum]] = {"weights": {}, "gradients": {}, "deltas": {}}
        starts: dict[tuple[str, str], Triplets | None] = {}
        for matrix in monitored(self.model, self.target, self.gradients):
            if _rank() != 0:
                if matrix.sharded:
                    matrix.read()  # all ranks gather what one of them measures
                continue
            values = matrix.read()
            key = (matrix.kind, matrix.name)
            start = self._starts.get(key)
            if start is not None and (start[0].shape[0], start[2].shape[1]) != values.shape:
                start = None  # the layer was replaced
            found[matrix.kind][matrix.name], starts[key] = leading_spectrum(values, self.k, self.steps, start)
        if _rank() != 0:
            return None
        self._starts = starts
        record = SpectrumRecord(self.steps, found["weights"], found["gradients"], found["deltas"])
        self._records.append(record)
        for output in self._outputs:
            output(record)
        return record

    def __enter__(self) -> SpectrumMonitor:
        if self._hook is not None:
            raise LowRankError("SpectrumMonitor: is in use already; leave its with block before the next.")
        self._counted = self.optimizer
        self._hook = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def to_hf_callback(self) -> Any:
        """Returns a callback for the ``Trainer`` of transformers, in the place of a ``with`` block.

        Step numbers are the trainer's, also after a resumption.

        Raises:
            MissingExtraError: if transformers is not installed.
        """
        return hf_callback("SpectrumMonitor", self._begin, self._end)

    def to_lightning_callback(self) -> Any:
        """Returns a callback for Lightning's ``Trainer``, in the place of a ``with`` block.

        Raises:
            MissingExtraError: if Lightning is not installed.
        """
        return lightning_callback("SpectrumMonitor", self._begin, self._end)

    def _begin(self, steps: int) -> None:
        self.steps = steps
        self.__enter__()

    def _end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._counted = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._counted is None and self._is_trained_by(optimizer):
            self._counted = optimizer
        if optimizer is self._counted:
            self.step()

    def _is_trained_by(self, optimizer: Optimizer) -> bool:
        own = set(self.model.parameters())
        return any(parameter in own for group in optimizer.param_groups for parameter in group["params"])


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
