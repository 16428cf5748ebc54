"""The steps of a recovery: gradients, the learning rate, and what an optimizer step needs around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...calibrate import Padding, check_loss
from ...calibrate.processes import Processes
from ...errors import CheckpointError, LowRankError
from ...layers import FactoredModule
from .distillation import unwrapped
from .objective import Objective, autocast, device_of, run_batch
from .settings import RecoverySettings


class Training:
    """A model that is trained step by step, with its optimizer.

    Args:
        model: the model, possibly wrapped.
        settings: how it is trained.
        objective: what is minimized.
        padding: what follows the masks of the model's forward passes.
        trained: the parameters that are trained, by name.
        optimizer: the optimizer; ``None`` makes one.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RecoverySettings,
        objective: Objective,
        padding: Padding,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._objective = objective
        self._padding = padding
        self._trained = list(trained.values())
        if optimizer is None:
            optimizer = torch.optim.AdamW(self._trained, lr=settings.lr, weight_decay=settings.weight_decay)
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._device = device_of(model)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.dtype == torch.float16)
        self.processes = Processes.of(model)

    def step(self, batches: Sequence[Any], done: int) -> float:
        """Runs one optimizer step; returns the objective, averaged over batches and processes.

        Args:
            batches: those whose gradients are accumulated.
            done: number of steps before it.

        Raises:
            LowRankError: if the objective is not finite; the parameters have not changed then.
        """
        self._model.zero_grad()
        total = torch.zeros((), device=self._device, dtype=torch.float64)
        for k, batch in enumerate(batches):
            with self._without_exchange() if k + 1 < len(batches) else nullcontext():
                with autocast(self._model, self._settings.dtype):
                    loss = run_batch(self._model, batch, self._padding, self._objective)
                loss = check_loss(loss, "recover_") / len(batches)
                self._scaler.scale(loss).backward()
            total += loss.detach().double().reshape(())
        value, count = self.processes.sums([float(total), 1.0], self._device)
        if not math.isfinite(value):
            raise LowRankError(
                f"recover_: the objective of step {done + 1} is {value}, expected a finite number; lower lr="
                f"{self._settings.lr!r} or look at the batches. The model has the parameters of the step before."
            )
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._settings.lr_factor(done)
        if self._settings.clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._trained, self._settings.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return value / count

    @contextmanager
    def running(self) -> Iterator[None]:
        """Trains the model inside; afterwards its modes, gradients and learning rates are as they were."""
        modes = [(module, module.training) for module in self._model.modules()]
        ids = {id(p) for p in self._trained}
        gradients = [(p, p.grad) for p in self._model.parameters()]
        # DistributedDataParallel waits for the gradients of all parameters that it was given
        resting = [] if isinstance(self._model, DistributedDataParallel) else self._model.parameters()
        frozen = [p for p in resting if p.requires_grad and id(p) not in ids]
        self._model.train()
        if self._settings.freeze_batch_norm:
            for module in self._model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter, _ in gradients:
            parameter.grad = None
        devices = {self._device} if self._device.type == "cuda" else set()
        try:
            with torch.random.fork_rng(list(devices)):
                torch.manual_seed(self._settings.seed)
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in frozen:
                parameter.requires_grad_(True)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer and of the scaler of gradients."""
        kind = type(self._optimizer).__name__
        return {"kind": kind, "optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned; raises if it is the state of another optimizer."""
        kind = type(self._optimizer).__name__
        if state["kind"] != kind:
            raise CheckpointError(
                f"recover_: the state in resume= is that of {state['kind']}, got the optimizer {kind}."
            )
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _without_exchange(self) -> Any:
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()


def trained_parameters(
    model: nn.Module, settings: RecoverySettings, optimizer: torch.optim.Optimizer | None, owner: str
) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained, by name.

    Args:
        model: the model, possibly wrapped.
        settings: which parameters these are, where there is no optimizer.
        optimizer: the optimizer, whose parameters these are.
        owner: the function that errors name.

    Raises:
        LowRankError: if there are none, or the optimizer has others.
    """
    inner = unwrapped(model)
    named = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    if settings.trainable == "factors":
        factored = [module for module in inner.modules() if isinstance(module, FactoredModule)]
        ids = {id(p) for module in factored for p in module.parameters()}
        named = {name: p for name, p in named.items() if id(p) in ids}
    if optimizer is not None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in named.items() if id(p) in own}
        if own - {id(p) for p in inner.parameters()}:
            raise LowRankError(
                f"{owner}: the optimizer has parameters that are not the model's; give factorize_ the optimizer too, or"
                " make it afterwards."
            )
    if not named:
        hint = "; trainable='factors' needs a factored model" if settings.trainable == "factors" else ""
        raise LowRankError(f"{owner}: got no parameter to train, expected one that requires gradients{hint}.")
    half = [name for name, p in named.items() if p.dtype == torch.float16]
    if half:
        raise LowRankError(
            f"{owner}: the parameter {half[0]!r} is torch.float16, in which small updates are lost; call model.float()"
            " and give dtype=torch.float16 for autocast."
        )
    return named
