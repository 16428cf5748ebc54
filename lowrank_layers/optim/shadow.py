"""One big parameter and the small one that an optimizer sees in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..decompose.ranks import matrix_rank
from ..errors import LowRankError
from ..rank import Rank
from .basis import ProjectionMethod, factors_basis, fitted, random_basis
from .optimizer_traits import FIRST_MOMENTS, SECOND_MOMENTS


@runtime_checkable
class FactorSource(Protocol):
    """What knows gradients as factors already, such as the state of a communication hook at low rank."""

    def factors(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """``[rows, rank]`` and ``[columns, rank]``, whose product is the last gradient; ``None`` where it is whole."""


class Shadow:
    """A parameter as a matrix ``[rows, rest]``, a basis of its shorter side, and the coefficients in that basis.

    Args:
        parameter: the big one.
        rank: below its shorter side, or a rule that finds it in the first gradient.
        seed: of what is drawn for it.
    """

    def __init__(self, parameter: Tensor, rank: Rank, seed: int) -> None:
        self.parameter, self.rule, self.seed = parameter, rank, seed
        self.size = parameter.shape[0], parameter[0].numel()
        self.left = self.size[0] < self.size[1]
        self.short = min(self.size)
        self.rank = rank if isinstance(rank, int) else 0  # 0: not known yet
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.small = nn.Parameter(parameter.new_empty(0, dtype=self.dtype))
        self.before: Tensor | None = None
        self.basis: Tensor | None = None
        self.age = 0  # steps since the last fit
        self.fits = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the coefficients."""
        return (self.rank, self.size[1]) if self.left else (self.size[0], self.rank)

    def knows_rank(self, gradient: Tensor) -> bool:
        """Whether there is a rank; a rule waits for a gradient that is finite and not zero."""
        if not self.rank and bool(torch.isfinite(gradient).all()) and bool(gradient.any()):
            self.rank = matrix_rank(self.rule, gradient, "LowRankProjection")
        return self.rank > 0

    def projector_shape(self, got: tuple[int, ...] | None) -> tuple[int, int]:
        """What a saved projector should be; a rule may have chosen any rank."""
        if isinstance(self.rule, int):
            return self.short, self.rule
        return self.short, min(got[-1], self.short) if got else 1

    def due(self, refresh: int) -> bool:
        """Whether this step wants a new basis."""
        return self.fits == 0 or self.age >= refresh

    def check(self) -> None:
        """Refuses a sparse gradient."""
        if self.parameter.grad is not None and self.parameter.grad.layout != torch.strided:
            raise LowRankError(
                f"LowRankProjection: got a sparse gradient of a parameter {list(self.parameter.shape)}, expected a"
                " dense one; build the embedding with sparse=False, or leave it out of target."
            )

    def gradient(self, decay: float) -> Tensor:
        """The matrix that the optimizer should see: the gradient plus ``decay`` times the weights."""
        gradient = self.parameter.grad
        assert gradient is not None
        matrix = gradient.flatten(1).to(self.dtype)
        return matrix.add(self._weights(), alpha=decay) if decay else matrix

    def refit(self, gradient: Tensor, method: ProjectionMethod, factors: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """A new basis, unless the gradient is not finite; returns how coefficients turn into it.

        Args:
            gradient: as a matrix.
            method: to find it.
            factors: of the gradient, where they are known: then nothing has to be decomposed.
        """
        old, seed = self.basis, self.seed + self.fits
        upright = gradient if self.left else gradient.mT
        if factors is None:
            new = fitted(upright, self.rank, method, old, seed)
        elif bool(torch.isfinite(gradient).all()):
            short, long = factors if self.left else factors[::-1]
            new = factors_basis(short.to(self.dtype), long.to(self.dtype), self.rank, old, seed)
        else:
            new = None
        if new is None:
            # tried again at the next step; without any basis one is drawn, and the step is what torch makes of NaN
            self.basis = random_basis(upright, self.rank, self.seed) if old is None else old
            return None
        # a view would keep the whole decomposition alive
        self.basis, self.age, self.fits = new.contiguous(), 0, self.fits + 1
        return None if old is None else new.mT @ old

    def rotate(self, state: dict[str, Any], turn: Tensor, second: bool) -> None:
        """Takes the moments along into the new basis; variances as if the old coefficients did not correlate."""
        # a centered RMSprop takes the root of square_avg - grad_avg^2, which only these two unrotated keep positive
        second = second and "grad_avg" not in state
        for keys, matrix in ((FIRST_MOMENTS, turn), (SECOND_MOMENTS if second else (), turn.square())):
            for key in keys:
                moment = state.get(key)
                if isinstance(moment, Tensor) and moment.shape == self.shape:
                    moment.copy_(matrix @ moment if self.left else moment @ matrix.mT)

    def project(self, gradient: Tensor, values: bool) -> None:
        """Gives the small parameter its gradient, and the projected weights or zeros as its value."""
        self.small.grad = None
        self.small.data = self._down(self._weights()) if values else gradient.new_zeros(self.shape)
        self.small.grad = self._down(gradient)
        self.before = self.small.detach().clone() if values else None

    def apply(self, shrink: float | Tensor | None, scale: float) -> None:
        """Adds the small parameter's step to the big one, which is multiplied by ``shrink`` first, if any."""
        assert self.basis is not None
        step = self.small.detach() if self.before is None else self.small.detach() - self.before
        factors = (self.basis, step) if self.left else (step, self.basis.mT)
        weight = self.shrunk(shrink)
        if weight.dtype == self.dtype and (weight.ndim == 2 or weight.is_contiguous()):
            weight.flatten(1).addmm_(*factors, alpha=scale)
        else:
            weight.add_((factors[0] @ factors[1]).reshape(weight.shape), alpha=scale)
        self.drop()
        self.age += 1

    def shrunk(self, shrink: float | Tensor | None) -> Tensor:
        """The big parameter's value, after it was multiplied by ``shrink`` in place."""
        weight = self.parameter.detach()
        return weight if shrink is None else weight.mul_(shrink)

    def drop(self) -> None:
        """Between steps the small parameter holds no memory."""
        self.small.grad = self.before = None
        self.small.data = self.small.data.new_empty(0)

    def state(self) -> dict[str, Any]:
        """What a run goes on with."""
        if self.basis is None:
            return {}
        return {"projector": self.basis, "projector_age": self.age, "projector_fits": self.fits}

    def load(self, state: Mapping[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        basis = state.get("projector")
        self.basis = None if basis is None else basis.detach().to(self.parameter.device, self.dtype, copy=True)
        self.age, self.fits = int(state.get("projector_age", 0)), int(state.get("projector_fits", 0))
        if not isinstance(self.rule, int):
            self.rank = 0 if basis is None else basis.shape[1]

    def _weights(self) -> Tensor:
        return self.parameter.detach().flatten(1).to(self.dtype)

    def _down(self, matrix: Tensor) -> Tensor:
        assert self.basis is not None
        return self.basis.mT @ matrix if self.left else matrix @ self.basis
