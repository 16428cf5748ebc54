"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from ..checks import check_integer, is_number
from ..errors import LowRankError


class SOAP(torch.optim.Optimizer):
    r"""Adam in the eigenbases of the second moments of each gradient matrix's rows and columns.

    The gradient ``[m, n]`` of a matrix (a convolution's kernel is flattened to ``[out, in * area]``) has the moments
    :math:`L = E[G G^T]` and :math:`R = E[G^T G]`, with eigenbases :math:`Q_L` and :math:`Q_R`. Adam's step is taken for
    :math:`Q_L^T G Q_R` and turned back. The two factors of a low-rank layer are ill-conditioned, since a change of one
    of them can be undone by the other, and their bases are small: one side of each has the size of the rank.

    The first step only measures moments. Parameters of one dimension are stepped by Adam.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the mean of gradients, and of their squares in the eigenbases.
        decay: decay of the moments :math:`L` and :math:`R`.
        eps: added to the root of the squares.
        weight_decay: decoupled weight decay.
        refresh: number of steps between two refreshes of the eigenbases, by one step of orthogonal iteration.
        max_size: a side of more entries is not rotated, as in the paper.

    Raises:
        LowRankError: for a setting that is out of range.

    Examples:
        >>> dense = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model = lr.factorize_(nn.Sequential(*dense), lr.make_plan(dense, rank=2))
        >>> batches = list(torch.randn(8, 32, 8))
        >>> optimizer = lr.SOAP(model.parameters(), lr=1e-2)
        >>> recovery = lr.recover_(model, batches, 20, teacher=dense, optimizer=optimizer, validation=batches)
        >>> recovery.score > recovery.scores[0][1]
        True

    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        decay: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 10,
        max_size: int = 4096,
    ) -> None:
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("decay", decay)):
            if not is_number(value) or not 0 <= value < 1:
                raise LowRankError(f"SOAP: got {name}={value!r}, expected a number in [0, 1).")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not is_number(value) or not 0 <= value < float("inf"):
                raise LowRankError(f"SOAP: got {name}={value!r}, expected a number of at least 0.")
        check_integer(refresh, "SOAP", "refresh", 1)
        check_integer(max_size, "SOAP", "max_size", 0)
        settings = {"lr": lr, "betas": betas, "decay": decay, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "refresh": refresh, "max_size": max_size})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        gradient = gradient.float() if gradient.dtype.itemsize < 4 else gradient
        gradient = (
            gradient.flatten(1) if gradient.ndim > 1 else gradient[None] if gradient.ndim else gradient.view(1, 1)
        )
        sides = _moments(gradient, group["max_size"] if parameter.ndim > 1 else 0)
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["squares"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            for name, moment in sides.items():
                state[f"{name}_moment"] = moment
                state[f"{name}_basis"] = torch.linalg.eigh(moment)[1]
            if sides:
                return
        state["step"] += 1
        step = int(state["step"])
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        for name, moment in sides.items():
            state[f"{name}_moment"].lerp_(moment, 1 - group["decay"])
        left, right = state.get("left_basis"), state.get("right_basis")
        rotated = _rotated(gradient, left, right)
        state["squares"].lerp_(rotated.square(), 1 - second)
        root = (state["squares"] / (1 - second**step)).sqrt_().add_(group["eps"])
        update = _rotated(state["mean"], left, right).div_(root).div_(1 - first**step)
        update = _rotated(update, _transposed(left), _transposed(right))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * update.view_as(parameter).to(parameter.dtype))
        if step % group["refresh"] == 0:
            for name in sides:
                state[f"{name}_basis"] = torch.linalg.qr(state[f"{name}_moment"] @ state[f"{name}_basis"])[0]


def _moments(gradient: Tensor, max_size: int) -> dict[str, Tensor]:
    """The second moments of the sides that are rotated."""
    found = {}
    if gradient.shape[0] <= max_size:
        found["left"] = gradient @ gradient.mT
    if gradient.shape[1] <= max_size:
        found["right"] = gradient.mT @ gradient
    return found


def _rotated(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    r"""The matrix in the eigenbases, :math:`Q_L^T M Q_R`; without a basis a side stays, and the matrix is copied."""
    matrix = matrix.clone() if left is None else left.mT @ matrix
    return matrix if right is None else matrix @ right


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT
