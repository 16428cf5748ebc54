"""A parameter with its projector, and the small parameter that the optimizer sees in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..decompose.ranks import matrix_rank
from ..errors import LowRankError
from ..rank import Rank
from .projectors import ProjectionMethod, fit_projector, projector_of_factors, random_projector
from .torch_optimizers import FIRST_MOMENTS, SECOND_MOMENTS


@runtime_checkable
class FactorSource(Protocol):
    """An object that has gradients as factors already, such as the state of a low-rank communication hook."""

    def factors(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors of a parameter's last gradient.

        Args:
            parameter: the parameter.

        Returns:
            ``[rows, rank]`` and ``[columns, rank]``, whose product is the gradient; ``None`` where it is not factored.
        """


class ProjectedParameter:
    """A parameter as a matrix ``[rows, rest]`` with a projector of its shorter side.

    Args:
        parameter: the parameter.
        rank: rank of the projector, less than the shorter side; or a rule that chooses it by the first gradient.
        seed: seed of what is random.

    Attributes:
        small: the parameter that the optimizer sees; its gradient is the projected gradient.
        projector: orthonormal ``[shorter side, rank]``; ``None`` before the first step.
        rank: the rank; 0 until a rule has chosen it.
        left: whether the projector is multiplied from the left.
    """

    def __init__(self, parameter: Tensor, rank: Rank, seed: int) -> None:
        self.parameter, self.rule, self.seed = parameter, rank, seed
        self.size = parameter.shape[0], parameter[0].numel()
        self.left = self.size[0] < self.size[1]
        self.short = min(self.size)
        self.rank = rank if isinstance(rank, int) else 0
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.small = nn.Parameter(parameter.new_empty(0, dtype=self.dtype))
        self.projector: Tensor | None = None
        self._age = 0  # steps since the last fit
        self._fits = 0
        self._before: Tensor | None = None  # the small parameter's value before the step

    @property
    def small_shape(self) -> tuple[int, int]:
        """Shape of the small parameter in a step."""
        return (self.rank, self.size[1]) if self.left else (self.size[0], self.rank)

    def knows_rank(self, gradient: Tensor) -> bool:
        """Whether the rank is known; a rule chooses it once a gradient is finite and not zero."""
        if not self.rank and bool(torch.isfinite(gradient).all()) and bool(gradient.any()):
            self.rank = matrix_rank(self.rule, gradient, "LowRankProjection")
        return self.rank > 0

    def expected_shape(self, saved: tuple[int, ...] | None) -> tuple[int, int]:
        """The shape that a saved projector should have, given the one it has; a rule may have chosen any rank."""
        if isinstance(self.rule, int):
            return self.short, self.rule
        return self.short, min(saved[-1], self.short) if saved else 1

    def due(self, refresh: int) -> bool:
        """Whether this step needs a new projector, ``refresh`` steps after the last one."""
        return self._fits == 0 or self._age >= refresh

    def check_gradient(self) -> None:
        """Raises for a sparse gradient."""
        if self.parameter.grad is not None and self.parameter.grad.layout != torch.strided:
            raise LowRankError(
                f"LowRankProjection: got a sparse gradient of a parameter {list(self.parameter.shape)}, expected a"
                " dense one; build the embedding with sparse=False, or leave it out of target."
            )

    def gradient(self, decay: float) -> Tensor:
        """The gradient as a matrix, plus ``decay`` times the weights."""
        gradient = self.parameter.grad
        assert gradient is not None
        matrix = gradient.flatten(1).to(self.dtype)
        return matrix.add(self._weights(), alpha=decay) if decay else matrix

    def refit(self, gradient: Tensor, method: ProjectionMethod, factors: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Fits a new projector, unless the gradient is not finite.

        Args:
            gradient: the gradient as a matrix.
            method: how the projector is found.
            factors: factors of the gradient where they are known; then nothing is decomposed.

        Returns:
            The matrix that takes coefficients in the old basis to the new one; ``None`` where there is none.
        """
        old, seed = self.projector, self.seed + self._fits
        upright = gradient if self.left else gradient.mT
        if factors is None:
            new = fit_projector(upright, self.rank, method, old, seed)
        elif bool(torch.isfinite(gradient).all()):
            short, long = factors if self.left else factors[::-1]
            new = projector_of_factors(short.to(self.dtype), long.to(self.dtype), self.rank, old, seed)
        else:
            new = None
        if new is None:
            # the next step tries again; the first one draws a projector, and does what torch makes of NaN
            self.projector = random_projector(upright, self.rank, self.seed) if old is None else old
            return None
        # a view would keep the whole decomposition alive
        self.projector, self._age, self._fits = new.contiguous(), 0, self._fits + 1
        return None if old is None else new.mT @ old

    def rotate_moments(self, state: dict[str, Any], rotation: Tensor, second: bool) -> None:
        """Takes the optimizer's moments of the small parameter to the new basis.

        Args:
            state: the optimizer's state of the small parameter.
            rotation: what :meth:`refit` returned.
            second: whether second moments are rotated too, as if the old coefficients were uncorrelated.
        """
        # a centered RMSprop takes the root of square_avg - grad_avg^2, which only these two unrotated keep positive
        second = second and "grad_avg" not in state
        for keys, matrix in ((FIRST_MOMENTS, rotation), (SECOND_MOMENTS if second else (), rotation.square())):
            for key in keys:
                moment = state.get(key)
                if isinstance(moment, Tensor) and moment.shape == self.small_shape:
                    moment.copy_(matrix @ moment if self.left else moment @ matrix.mT)

    def project(self, gradient: Tensor, values: bool) -> None:
        """Gives the small parameter its gradient and its value.

        Args:
            gradient: the gradient as a matrix.
            values: whether the value is that of the projected weights, not zero.
        """
        self.small.grad = None
        self.small.data = self._down(self._weights()) if values else gradient.new_zeros(self.small_shape)
        self.small.grad = self._down(gradient)
        self._before = self.small.detach().clone() if values else None

    def apply_step(self, shrink: float | Tensor | None, scale: float) -> None:
        """Adds the small parameter's step to the parameter.

        Args:
            shrink: factor on the parameter before, from decoupled weight decay; ``None`` is 1.
            scale: factor on the step.
        """
        assert self.projector is not None
        step = self.small.detach() if self._before is None else self.small.detach() - self._before
        factors = (self.projector, step) if self.left else (step, self.projector.mT)
        weight = self.shrink_(shrink)
        if weight.dtype == self.dtype and (weight.ndim == 2 or weight.is_contiguous()):
            weight.flatten(1).addmm_(*factors, alpha=scale)
        else:
            weight.add_((factors[0] @ factors[1]).reshape(weight.shape), alpha=scale)
        self._free_small()
        self._age += 1

    def shrink_(self, factor: float | Tensor | None) -> Tensor:
        """Multiplies the parameter in place, unless the factor is ``None``; returns its value."""
        weight = self.parameter.detach()
        return weight if factor is None else weight.mul_(factor)

    def state(self) -> dict[str, Any]:
        """What a state dict holds of the projector."""
        if self.projector is None:
            return {}
        return {"projector": self.projector, "projector_age": self._age, "projector_fits": self._fits}

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        projector = state.get("projector")
        self.projector = (
            None if projector is None else projector.detach().to(self.parameter.device, self.dtype, copy=True)
        )
        self._age, self._fits = int(state.get("projector_age", 0)), int(state.get("projector_fits", 0))
        if not isinstance(self.rule, int):
            self.rank = 0 if projector is None else projector.shape[1]

    def _free_small(self) -> None:
        """Frees the memory of the small parameter until the next step."""
        self.small.grad = self._before = None
        self.small.data = self.small.data.new_empty(0)

    def _weights(self) -> Tensor:
        return self.parameter.detach().flatten(1).to(self.dtype)

    def _down(self, matrix: Tensor) -> Tensor:
        assert self.projector is not None
        return self.projector.mT @ matrix if self.left else matrix @ self.projector
