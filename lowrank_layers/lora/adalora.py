"""AdaLoRA: ranks that differ from layer to layer, found while training under one budget for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_integer, is_number
from ..errors import LowRankError
from ..files import read_tensors, write_tensors
from ..modules import Succession, check_model, remap_optimizer_
from ..trainer_callbacks import hf_callback
from .adapted_weight import adapted_weights
from .attach import adapting, choose_name
from .cutting import check_optimizer
from .importance import TrackedAdapter
from .trainable_tokens import TokenRows

_STEP = "step"
KEY = "lowrank_layers.lora_rank_allocator"
FILE = "lora_rank_allocator.safetensors"
"""The file in a checkpoint of transformers' Trainer."""


class LoraRankAllocator:
    r"""Gives the directions of an adapter to the weights that need them, under one budget (Zhang et al., 2023).

    Direction :math:`i` of a weight is row :math:`i` of ``A`` with column :math:`i` of ``B``. Its importance is the mean
    over its entries of the smoothed sensitivity :math:`|w \nabla_w L|` times the uncertainty of that. From ``start`` on
    the least important ones of the whole model are set to add nothing; their gradients go on, so that they may come
    back. The budget falls with the third power until ``stop``; from then on the choice is fixed, and :meth:`finish`
    cuts out what was dropped.

    Where an adapter starts from a product that is taken off again (PiSSA, OLoRA, CorDA), a dropped direction goes back
    to its start, and sensitivity is measured from there: the base keeps what the direction was made of.

    Args:
        model: an adapted model; give ``add_lora_`` half as much rank again as should be left.
        rank: average rank that is left; times the number of weights with the adapter it is the budget.
        start: number of steps before the first direction is dropped.
        stop: step at which the budget is reached; train on for a while after it.
        every: number of steps from one choice to the next.
        beta1: smoothing of the sensitivity: the factor of its old average at each step.
        beta2: smoothing of the uncertainty.
        name: name of the adapter; may be left out where there is one only.

    Raises:
        LowRankError: for arguments that fit neither each other nor the model.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=4)
        >>> optimizer = torch.optim.AdamW(lr.lora_parameters(model), lr=1e-2)
        >>> allocator = lr.LoraRankAllocator(model, rank=2.5, start=2, stop=6)
        >>> for _ in range(8):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     allocator.step()
        ...     optimizer.zero_grad()
        >>> sum(allocator.ranks().values())
        5
        >>> _ = allocator.finish(optimizer)
        >>> sum(len(module.lora_weight.adapters["default"].A) for module in model)
        5

    Reference:
        Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int | float,
        *,
        start: int,
        stop: int,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        name: str | None = None,
    ) -> None:
        check_model(model)
        for what, count, least in (("start", start, 0), ("stop", stop, 1), ("every", every, 1)):
            check_integer(count, "LoraRankAllocator", what, least)
        if stop <= start:
            raise LowRankError(f"LoraRankAllocator: got start={start} and stop={stop}, expected start before stop.")
        for what, beta in (("beta1", beta1), ("beta2", beta2)):
            if not is_number(beta) or not 0 < beta < 1:
                raise LowRankError(f"LoraRankAllocator: got {what}={beta!r}, expected a number between 0 and 1.")
        if not is_number(rank) or not 0 < rank < math.inf:
            raise LowRankError(f"LoraRankAllocator: got rank={rank!r}, expected a positive number.")
        name = choose_name(model, name, "LoraRankAllocator")
        tracked = {
            weight.name: TrackedAdapter(weight, name)
            for weight in adapted_weights(model, name)
            if not isinstance(weight.adapter(name), TokenRows)
        }
        total = sum(len(each.kept) for each in tracked.values())
        budget = round(rank * len(tracked))
        if not 1 <= budget <= total:
            raise LowRankError(
                f"LoraRankAllocator: got rank={rank!r}, which is {budget} directions for {len(tracked)} weights,"
                f" expected 1 to the {total} that they have; call add_lora_ with a greater rank, or give a smaller one."
            )
        self.model, self.name = model, name
        self.start, self.stop, self.every = start, stop, every
        self.beta1, self.beta2 = float(beta1), float(beta2)
        self._tracked, self._total, self._last = tracked, total, budget
        self._step, self._finished = 0, False
        self._check("LoraRankAllocator")

    def budget(self, step: int) -> int:
        """The number of directions of the whole model after so many steps (equation 12 of the paper).

        Args:
            step: number of calls of :meth:`step`.
        """
        if step <= self.start:
            return self._total
        left = 1 - min(1.0, (step - self.start) / (self.stop - self.start))
        return int((self._total - self._last) * left**3 + self._last)

    def ranks(self) -> dict[str, int]:
        """The present rank of each weight, by the weight's name."""
        return {label: int(each.kept.sum()) for label, each in self._tracked.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Updates the importances and drops what exceeds the budget; call it after the optimizer's step.

        A weight without a gradient keeps its averages. With a gradient that is not finite, for which a ``GradScaler``
        leaves out its step, they stay as well. All processes of a ``DistributedDataParallel`` choose the same.

        Raises:
            LowRankError: if the adapters are merged, sharded or changed, or after :meth:`finish`.
        """
        self._check("step")
        self._step += 1
        if self._step <= self.stop:
            finite = self._finite()
            for each in self._tracked.values():
                each.observe(finite, self.beta1, self.beta2)
            if self._step == self.stop or (self._step > self.start and self._step % self.every == 0):
                self._choose(self.budget(self._step))
        if self._step >= self.stop or (self._step > self.start and self._step % self.every == 0):
            for each in self._tracked.values():
                each.mask_()

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Cuts the dropped directions out of the adapters, in place; the model's outputs stay as they are.

        The scaling of every adapter stays. A weight that has no direction left has no adapter any more, unless that
        has a magnitude (DoRA) or a bias: then one direction of zeros is kept for them. The parameters are new
        ones: wrap with ``DistributedDataParallel`` or make an optimizer afterwards, or give the optimizer.

        Args:
            optimizer: gets the new parameters; its state of what is kept (momentum...) stays.

        Returns:
            The model.

        Raises:
            LowRankError: before ``stop``, a second time, or if the optimizer's state cannot be cut; nothing changes
                then.
        """
        self._check("finish")
        if self._step < self.stop:
            raise LowRankError(
                f"finish: {self._step} of {self.stop} steps were made and the budget is not reached; go on training."
            )
        if optimizer is not None:
            check_optimizer(optimizer, [p for each in self._tracked.values() for p in each.adapter.parameters()])
        successions: list[Succession] = []
        with adapting(self.model):
            for each in self._tracked.values():
                successions += each.cut_()
        if optimizer is not None:
            remap_optimizer_(optimizer, successions)
        self._finished = True
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """The state as plain tensors, with which a run is resumed, beside the states of model and optimizer."""
        self._check("state_dict")
        state = {_STEP: torch.tensor(self._step)}
        for label, each in self._tracked.items():
            state[f"{label}.kept"] = each.kept.clone()
            state |= {f"{label}.{key}": value.clone() for key, value in each.averages.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resumes from a state.

        Args:
            state: what :meth:`state_dict` returned, for the same adapters.

        Raises:
            LowRankError: if it belongs to other adapters; nothing changes then.
        """
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [key for key in own if key in state and state[key].shape != own[key].shape]
        if wrong:
            raise LowRankError(
                f"load_state_dict: {', '.join(map(repr, wrong[:3]))} {'is' if len(wrong) == 1 else 'are'} missing,"
                " unknown or of another shape; make the allocator for the same adapters as the saved one."
            )
        self._step = int(state[_STEP])
        for label, each in self._tracked.items():
            each.kept = state[f"{label}.kept"].detach().to("cpu", torch.bool, copy=True)
            for key, value in each.averages.items():
                each.averages[key] = state[f"{label}.{key}"].detach().to(value.device, torch.float32, copy=True)

    def to_hf_callback(self) -> Any:
        """Returns a callback for the ``Trainer`` of transformers, which calls :meth:`step` in the place of a loop.

        Every checkpoint holds the state too, and a run that is resumed from one goes on with it. Call :meth:`finish`
        after the training.

        Raises:
            MissingExtraError: if transformers is not installed.
        """
        return hf_callback(step=self.step, save=self._save, resume=self._resume)

    def _save(self, folder: Path) -> None:
        write_tensors(folder / FILE, self.state_dict(), KEY, {})

    def _resume(self, folder: Path) -> None:
        self.load_state_dict(read_tensors(folder / FILE, KEY, "was not written by LoraRankAllocator.")[1])

    def _finite(self) -> Tensor:
        """A flag on the device, for which nothing waits: all gradients are finite."""
        every = [p for each in self._tracked.values() for p in (each.adapter.A, each.adapter.B)]
        flags = [p.grad.isfinite().all() for p in every if p.grad is not None]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else torch.tensor(True)

    def _choose(self, budget: int) -> None:
        """The best directions of the whole model; among equals the first, so that the budget is met exactly."""
        tracked = list(self._tracked.values())
        order = torch.cat([each.scores() for each in tracked]).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget]] = True
        for each, flags in zip(tracked, kept.split([len(each.kept) for each in tracked]), strict=True):
            each.kept = flags.clone()

    def _check(self, who: str) -> None:
        if self._finished:
            raise LowRankError(f"{who}: finish() was called before, and the adapters are cut; make a new allocator.")
        for label, each in self._tracked.items():
            if each.weight.adapter(self.name) is not each.adapter:
                raise LowRankError(
                    f"{who}: the adapter {self.name!r} of {label!r} is another than at the start; make a new allocator."
                )
            if each.weight.bank.merged is not None:
                raise LowRankError(f"{who}: the adapters of {label!r} are merged; call unmerge_lora_ first.")
            if type(each.adapter.A).__name__ == "DTensor":
                raise LowRankError(
                    f"{who}: the adapter of {label!r} is sharded, and no process sees a whole direction; train with"
                    " DistributedDataParallel instead of fully_shard."
                )
