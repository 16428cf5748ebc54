"""Doing something every few steps of the optimizer that trains a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..checks import check_integer
from ..errors import LowRankError
from ..trainer_callbacks import hf_callback, lightning_callback
from .monitored import unwrapped

if TYPE_CHECKING:
    from typing_extensions import Self


class EveryFewSteps(ABC):
    """Counts optimizer steps inside a ``with`` block, and calls :meth:`due` after step ``every``, ``2 every``, ...

    The steps are seen by a hook on torch's optimizers; the model gets no hooks, so that a compiled one is not compiled
    again.

    Args:
        model: the model, possibly compiled or wrapped in ``DistributedDataParallel``.
        every: number of optimizer steps between two calls.
        optimizer: the optimizer whose steps count; by default, the first that steps and trains a part of the model.

    Raises:
        LowRankError: for what is no model, no number of steps, or an optimizer that does not train the model.
    """

    def __init__(self, model: nn.Module, every: int, optimizer: Optimizer | None) -> None:
        self._who = type(self).__name__
        if not isinstance(model, nn.Module):
            raise LowRankError(f"{self._who}: got {type(model).__name__}, expected a torch.nn.Module.")
        check_integer(every, self._who, "every", 1)
        self.model = unwrapped(model)
        if optimizer is not None and not (isinstance(optimizer, Optimizer) and self._is_trained_by(optimizer)):
            raise LowRankError(
                f"{self._who}: got optimizer={type(optimizer).__name__}, expected a torch optimizer that holds"
                " parameters of the model."
            )
        self.every, self.optimizer = every, optimizer
        self.steps = 0
        """Number of optimizer steps so far; set it when training is resumed."""
        self._counted: Optimizer | None = None
        self._hook: Any = None

    @abstractmethod
    def due(self) -> object:
        """What is done every few steps."""

    def step(self) -> None:
        """Counts an optimizer step and acts when it is time, for training without a ``with`` block."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.due()

    def __enter__(self) -> Self:
        if self._hook is not None:
            raise LowRankError(f"{self._who}: is in use already; leave its with block before the next.")
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
        return hf_callback(self._begin, self._end)

    def to_lightning_callback(self) -> Any:
        """Returns a callback for Lightning's ``Trainer``, in the place of a ``with`` block.

        Raises:
            MissingExtraError: if Lightning is not installed.
        """
        return lightning_callback(self._begin, self._end)

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


def process_rank() -> int:
    """The rank of this process in the default group; 0 where there is none."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
