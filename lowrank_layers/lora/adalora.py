"""Ranks that differ from layer to layer, found while training: a global budget for the directions of an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules import Succession, check_model, remap_optimizer_, update_shortcuts_
from .adapted_weight import adapted_weights
from .attach import choose_name, detach_
from .cutting import check_optimizer, cut_, gone
from .importance import Watched
from .tokens import TokenRows

_STEP = "step"


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
        rank: left on average, of every weight with the adapter; times the number of weights it is the budget.
        start: steps before the first direction is dropped.
        stop: the step at which the budget is reached; train on for a while after it.
        every: steps from one choice to the next.
        beta1: of the average of the sensitivity.
        beta2: of the average of the uncertainty.
        name: of the adapter; may be left out where there is one only.

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
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise LowRankError(
                    f"LoraRankAllocator: got {what}={count!r}, expected a number of steps of at least {least}."
                )
        if stop <= start:
            raise LowRankError(f"LoraRankAllocator: got start={start} and stop={stop}, expected start before stop.")
        for what, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < 1:
                raise LowRankError(f"LoraRankAllocator: got {what}={beta!r}, expected a number between 0 and 1.")
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not 0 < rank < math.inf:
            raise LowRankError(f"LoraRankAllocator: got rank={rank!r}, expected a positive number.")
        name = choose_name(model, name, "LoraRankAllocator")
        watched = {
            weight.name: Watched(weight.bank, name)
            for weight in adapted_weights(model, name)
            if not isinstance(weight.adapter(name), TokenRows)
        }
        total = sum(len(each.kept) for each in watched.values())
        budget = round(rank * len(watched))
        if not 1 <= budget <= total:
            raise LowRankError(
                f"LoraRankAllocator: got rank={rank!r}, which is {budget} directions for {len(watched)} weights,"
                f" expected 1 to the {total} that they have; call add_lora_ with a greater rank, or give a smaller one."
            )
        self.model, self.name = model, name
        self.start, self.stop, self.every = start, stop, every
        self.beta1, self.beta2 = float(beta1), float(beta2)
        self._watched, self._total, self._last = watched, total, budget
        self._step, self._finished = 0, False
        self._check("LoraRankAllocator")

    def budget(self, step: int) -> int:
        """The number of directions that the whole model has after that many steps (equation 12 of the paper)."""
        if step <= self.start:
            return self._total
        left = 1 - min(1.0, (step - self.start) / (self.stop - self.start))
        return int((self._total - self._last) * left**3 + self._last)

    def ranks(self) -> dict[str, int]:
        """The directions that each weight has at present, by the weight's name."""
        return {label: int(each.kept.sum()) for label, each in self._watched.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Looks at the gradients and drops what exceeds the budget; call it after the optimizer's step.

        A weight without a gradient keeps its averages. With a gradient that is not finite, for which a ``GradScaler``
        leaves out its step, they stay as well. All processes of a ``DistributedDataParallel`` choose the same.

        Raises:
            LowRankError: if the adapters are merged, sharded or changed, or after :meth:`finish`.
        """
        self._check("step")
        self._step += 1
        if self._step <= self.stop:
            finite = self._finite()
            for each in self._watched.values():
                each.observe(finite, self.beta1, self.beta2)
            if self._step == self.stop or (self._step > self.start and self._step % self.every == 0):
                self._choose(self.budget(self._step))
        if self._step >= self.stop or (self._step > self.start and self._step % self.every == 0):
            for each in self._watched.values():
                each.mask_()

    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
        """Cuts the dropped directions out, in place; the outputs stay as they are.

        The scaling of every adapter stays. A weight that has no direction left is plain again, unless its adapter
        has a magnitude (DoRA) or a bias: then one direction of zeros is kept for them. The parameters are new
        ones: wrap with ``DistributedDataParallel`` or make an optimizer afterwards, or give the optimizer.

        Args:
            optimizer: its groups get the new parameters, and what it knows of the kept entries (momentum...) stays.

        Returns:
            The model.

        Raises:
            LowRankError: before ``stop``, a second time, or if the optimizer's state cannot be cut; nothing changes
                then.
        """
        self._check("finish")
        if self._step < self.stop:
            raise LowRankError(
                f"finish: {self._step} of {self.stop} steps were made and the budget is not reached; call step() on."
            )
        if optimizer is not None:
            check_optimizer(optimizer, [p for each in self._watched.values() for p in each.adapter.parameters()])
        successions: list[Succession] = []
        empty: set[int] = set()
        for each in self._watched.values():
            each.mask_()
            adapter = each.adapter
            index = each.kept.nonzero().flatten()
            if len(index) == len(each.kept):
                continue
            if len(index) or adapter.magnitude is not None or adapter.bias is not None:
                successions += cut_(adapter, each.bank.kind, index if len(index) else torch.zeros(1, dtype=torch.long))
            else:
                successions += gone(adapter)
                each.bank.drop(self.name)
                empty.add(id(each.bank))
        for weight in adapted_weights(self.model):
            if id(weight.bank) in empty and not weight.bank.names:
                detach_(weight)
        if optimizer is not None:
            remap_optimizer_(optimizer, successions)
        self._finished = True
        update_shortcuts_(self.model)
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors with which a run goes on where it stopped, beside the state of model and optimizer."""
        self._check("state_dict")
        state = {_STEP: torch.tensor(self._step)}
        for label, each in self._watched.items():
            state[f"{label}.kept"] = each.kept.clone()
            state |= {f"{label}.{key}": value.clone() for key, value in each.averages.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state.

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
        for label, each in self._watched.items():
            each.kept = state[f"{label}.kept"].detach().to("cpu", torch.bool, copy=True)
            for key, value in each.averages.items():
                each.averages[key] = state[f"{label}.{key}"].detach().to(value.device, torch.float32, copy=True)

    def _finite(self) -> Tensor:
        """Whether all gradients are, as a flag on the device: nothing waits for it."""
        every = [p for each in self._watched.values() for p in (each.adapter.A, each.adapter.B)]
        flags = [p.grad.isfinite().all() for p in every if p.grad is not None]
        return torch.stack([flag.to(flags[0].device) for flag in flags]).all() if flags else torch.tensor(True)

    def _choose(self, budget: int) -> None:
        """The best directions of the whole model; among equals the first, so that the budget is met exactly."""
        watched = list(self._watched.values())
        order = torch.cat([each.scores() for each in watched]).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:budget]] = True
        for each, flags in zip(watched, kept.split([len(each.kept) for each in watched]), strict=True):
            each.kept = flags.clone()

    def _check(self, who: str) -> None:
        if self._finished:
            raise LowRankError(f"{who}: finish() was called before, and the adapters are cut; make a new allocator.")
        for label, each in self._watched.items():
            if each.bank.merged is not None:
                raise LowRankError(f"{who}: the adapters of {label!r} are merged; call unmerge_lora_ first.")
            if each.bank.adapters._modules.get(self.name) is not each.adapter:
                raise LowRankError(
                    f"{who}: the adapter {self.name!r} of {label!r} is another than at the start; make a new allocator."
                )
            if type(each.adapter.A).__name__ == "DTensor":
                raise LowRankError(
                    f"{who}: the adapter of {label!r} is sharded, and no process sees a whole direction; train with"
                    " DistributedDataParallel instead of fully_shard."
                )
