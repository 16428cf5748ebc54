"""One row per decomposition and method; a new one is one more row in ``DECOMPOSITIONS``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lowrank_layers as lr

from .common import generator


@dataclass(frozen=True)
class DecompositionRow:
    """A decomposition.

    Args:
        name: name of the row.
        function: the public function, whose name opens every error message.
        keywords: keyword arguments that the row fixes.
        shape: shape of a sample.
        per_mode: whether it takes one rank per mode.
        full: rank at which nothing is lost, for a shape.
        exact: relative error allowed at full rank in fp64.
        orthonormal: returns the matrices of a factorization whose columns are orthonormal.
        nonnegative: whether it takes non-negative tensors only.
        sparse: whether it takes sparse matrices.
    """

    name: str
    function: Callable[..., Any]
    keywords: dict[str, Any]
    shape: tuple[int, ...]
    per_mode: bool
    full: Callable[[tuple[int, ...]], Any]
    exact: float
    orthonormal: Callable[[Any], list[Tensor]]
    nonnegative: bool = False
    sparse: bool = False

    def sample(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random tensor that it takes."""
        tensor = torch.randn(*self.shape, generator=generator(seed), dtype=torch.float64).to(dtype)
        return tensor.abs() if self.nonnegative else tensor

    def __call__(self, tensor: Tensor, rank: Any) -> Any:
        return self.function(tensor, rank, **self.keywords)

    def rank(self, each: Any, ndim: int | None = None) -> Any:
        """``each`` as this decomposition's rank argument."""
        return (each,) * (len(self.shape) if ndim is None else ndim) if self.per_mode else each


def _svd_row(method: str) -> DecompositionRow:
    return DecompositionRow(
        f"svd {method}", lr.svd, {"method": method}, (12, 9), False, min, 1e-13, lambda f: [f.u, f.vh.mT], sparse=True
    )


def _tucker_row(name: str, **keywords: Any) -> DecompositionRow:
    def factors(f: lr.Tucker) -> list[Tensor]:
        return [factor for factor in f.factors if factor is not None]

    return DecompositionRow(name, lr.tucker, keywords, (6, 5, 3, 3), True, tuple, 1e-13, factors)


def _nmf_row(solver: str, loss: str) -> DecompositionRow:
    # the start without zeros filled in is exact for a constant, which multiplicative updates only approach
    keywords = {"solver": solver, "loss": loss, "init": "nndsvd"}
    return DecompositionRow(
        f"nmf {solver} {loss}",
        lr.nmf,
        keywords,
        (12, 9),
        False,
        min,
        1e-13,
        lambda f: [],
        nonnegative=True,
        sparse=True,
    )


SVD_METHODS = ["exact", "gram", "randomized", "krylov", "auto"]

DECOMPOSITIONS = [
    *map(_svd_row, SVD_METHODS),
    _tucker_row("hooi"),
    _tucker_row("hosvd", sweeps=0),
    DecompositionRow(
        "cp", lr.cp, {}, (5, 4, 3), False, lambda shape: math.prod(shape) // max(shape), 1e-6, lambda f: []
    ),
    _nmf_row("hals", "frobenius"),
    _nmf_row("mu", "frobenius"),
    _nmf_row("mu", "kl"),
]
