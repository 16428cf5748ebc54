"""The options of low-rank gradient averaging, validated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import check_integer, is_number
from ..errors import LowRankError
from ..rank import Budget, Rank, check_rank

WIRE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
ERROR_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_WHO = "PowerSGDSettings"


@dataclass(frozen=True)
class PowerSGDSettings:
    """Options of averaging gradients at low rank, for :class:`LowRankCommState` and :func:`attach_low_rank_reduce`.

    Args:
        rank: rank of the averaged gradients. An integer holds for all of them; a rank rule chooses by the singular
            values of each gradient that is averaged at step ``start_step`` (``RelativeError`` bounds the relative
            error of the approximation); ``Budget(bytes=)`` limits the bytes that a process sends per step (with
            ``alternate``, the mean of two steps) and chooses the ranks with the least total error. A layer that is
            unfrozen later has to fit into what is left of the budget.
        start_step: number of first steps whose gradients are averaged exactly.
        saving: a gradient is compressed only if its factors have fewer than ``1 / saving`` of its elements.
        alternate: sends only one of the two factors per step, in turn (ACP-SGD; Zhang et al., 2023).
        refresh: number of steps after which the warm start is replaced by random directions; ``None`` keeps it.
        local_iterations: number of subspace iterations that each process makes on its own gradient before the first
            factor is sent. They improve the directions, send nothing, and cost two matrix products each. Not used
            with ``alternate``.
        wire: dtype of what is sent; ``None`` is fp32 (FSDP2 sends tensors that are not compressed in the dtype of its
            reduction). Values that overflow fp16 are sent again in fp32. ``torch.int8`` sends factors as MXINT8 and
            everything else with 16 bits per element, by an all-to-all and an all-gather.
        error_dtype: dtype in which the error feedback is stored: fp32, bf16, or int8 (as MXINT8).
        error_feedback: adds the part of a gradient that was not sent to the next one.
        warm_start: starts each step from the directions of the last one.

    Raises:
        LowRankError: for a value that is out of range.

    Examples:
        >>> settings = lr.PowerSGDSettings(rank=4, wire=torch.bfloat16)
        >>> lr.LowRankCommState(settings, start_step=100).settings.wire
        torch.bfloat16

    Reference:
        Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, NeurIPS 2019.
    """

    rank: Rank | Budget = 4
    start_step: int = 0
    saving: float = 1.0
    alternate: bool = False
    refresh: int | None = None
    local_iterations: int = 1
    wire: torch.dtype | None = None
    error_dtype: torch.dtype = torch.float32
    error_feedback: bool = True
    warm_start: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rank, Budget):
            _check_budget(self.rank)
        else:
            check_rank(self.rank, _WHO)
        check_integer(self.start_step, _WHO, "start_step", 0)
        check_integer(self.local_iterations, _WHO, "local_iterations", 0)
        if self.refresh is not None:
            check_integer(self.refresh, _WHO, "refresh", 1)
        if not is_number(self.saving) or not self.saving > 0:
            raise LowRankError(f"{_WHO}: got saving={self.saving!r}, expected a positive number.")
        if self.wire is not None and self.wire not in WIRE_DTYPES:
            raise LowRankError(f"{_WHO}: got wire={self.wire!r}, expected None or one of {list(WIRE_DTYPES)}.")
        if self.error_dtype not in ERROR_DTYPES:
            raise LowRankError(f"{_WHO}: got error_dtype={self.error_dtype!r}, expected one of {list(ERROR_DTYPES)}.")


def _check_budget(budget: Budget) -> None:
    if budget.units != ("bytes",) or budget.loss is not None:
        raise LowRankError(f"{_WHO}: got {budget}, expected the bytes per step alone, as in Budget(bytes=100_000).")
    if budget.of != "model":
        raise LowRankError(f"{_WHO}: got {budget}, expected one without of=: it counts all dense gradients.")
