"""Keeping the weights every few steps, for the spectrum of a trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .monitored import gathered
from .optimizer_steps import EveryFewSteps, process_rank

if TYPE_CHECKING:
    from typing_extensions import Self


class CheckpointRecorder(EveryFewSteps):
    """Keeps copies of a model's trained parameters every few optimizer steps, for :func:`trajectory_spectrum`.

    Inside a ``with`` block it counts the steps of the optimizer that trains the model, as :class:`SpectrumMonitor`. The
    first copy is that of the weights at the beginning of the block. Copies are in the memory of the CPU, each as large
    as the trained parameters. With several processes only rank 0 keeps them.

    Args:
        model: the model, possibly compiled or wrapped in ``DistributedDataParallel``.
        every: number of optimizer steps between copies.
        optimizer: the optimizer whose steps count; by default, the first that steps and trains a part of the model.

    Raises:
        LowRankError: for what is no model, no number of steps, or an optimizer that does not train the model.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with lr.CheckpointRecorder(model, every=2) as recorder:
        ...     for _ in range(6):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 8)).square().mean().backward()
        ...         optimizer.step()
        >>> len(recorder), lr.trajectory_spectrum(recorder).projections.shape
        (4, torch.Size([3, 3]))
    """

    def __init__(self, model: nn.Module, *, every: int = 100, optimizer: Optimizer | None = None) -> None:
        super().__init__(model, every, optimizer)
        self._checkpoints: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self._checkpoints)

    def __len__(self) -> int:
        return len(self._checkpoints)

    def __enter__(self) -> Self:
        super().__enter__()
        if not self._checkpoints:
            self.due()
        return self

    @torch.no_grad()
    def due(self) -> None:
        """Keeps a copy now."""
        copies = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = gathered(parameter)
                if process_rank() == 0:
                    copies[name] = whole.to("cpu", copy=True)
        if process_rank() == 0:
            self._checkpoints.append(copies)
