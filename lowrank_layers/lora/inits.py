"""How adapters start. Those of singular values start from a product that is taken off again: the base is untouched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..decompose import svd
from ..errors import LowRankError
from ..linalg import damp, leading_eigenvectors, psd_root
from .kinds import Kind

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda"]


@dataclass(frozen=True)
class Start:
    """What an init may look at: the frozen weight, its layout, the rank, the scaling, a generator, ``E[x x^T]``."""

    weight: Tensor
    kind: Kind
    rank: int
    scaling: float
    generator: torch.Generator | None
    moment: Tensor | None = None


class Started(NamedTuple):
    """``A``, ``B``, and the frozen copies whose product is taken off, where that of ``B A`` is not zero."""

    a: Tensor
    b: Tensor
    taken_off: tuple[Tensor, Tensor] | None = None


def _kaiming(start: Start) -> Started:
    """``A`` as a fresh linear layer, ``B`` zero."""
    a, b = start.kind.shapes(start.weight, start.rank)
    bound = 1 / math.sqrt(start.kind.matrix(start.weight).shape[-1])
    return Started(_uniform(start, a, bound), start.weight.new_zeros(b))


def _gaussian(start: Start) -> Started:
    """``A`` normal with deviation ``1 / rank``, ``B`` zero."""
    a, b = start.kind.shapes(start.weight, start.rank)
    values = torch.randn(a, generator=start.generator, dtype=torch.float32) / start.rank
    return Started(values.to(start.weight), start.weight.new_zeros(b))


def _orthogonal(start: Start) -> Started:
    """``A`` with orthonormal rows in every group, ``B`` zero."""
    a, b = start.kind.shapes(start.weight, start.rank)
    width = start.kind.matrix(start.weight).shape[-1]
    normal = torch.randn(math.prod(a) // (width * start.rank), width, start.rank, generator=start.generator)
    return Started(torch.linalg.qr(normal).Q.mT.reshape(a).to(start.weight), start.weight.new_zeros(b))


def _pissa(start: Start) -> Started:
    """The leading singular triplets of the weight (Meng et al., 2024)."""
    f = svd(_plain_matrix(start, "pissa").float(), start.rank)
    up, down = f.pair()
    return _taken_off(start, down, up)


def _olora(start: Start) -> Started:
    """The leading columns of ``Q`` and rows of ``R`` (Büyükakyüz, 2024)."""
    factors = torch.linalg.qr(_plain_matrix(start, "olora").float())
    return _taken_off(start, factors.R[: start.rank], factors.Q[:, : start.rank])


def _eva(start: Start) -> Started:
    """``A`` the leading directions of the inputs, ``B`` zero (Paischer et al., 2024)."""
    moment = _moment(start, "eva")
    rows = leading_eigenvectors(moment, start.rank).mT
    a, b = start.kind.shapes(start.weight, start.rank)
    return Started(rows.reshape(a).to(start.weight).contiguous(), start.weight.new_zeros(b))


def _corda(start: Start) -> Started:
    """The leading triplets of ``W C``, taken back by ``C^-1``, with ``C = E[x x^T]`` (Yang et al., 2024)."""
    root = psd_root(damp(_moment(start, "corda"), 1e-3))
    moment = root.factor.mT @ root.factor
    f = svd(_plain_matrix(start, "corda").double() @ moment, start.rank)
    up, down = f.pair()
    return _taken_off(start, root.solve(down.mT).mT, up)


def _moment(start: Start, who: str) -> Tensor:
    if start.moment is None or start.moment.ndim != 2:
        raise LowRankError(
            f"add_lora_: init {who!r} needs the input moments of a linear layer or a convolution without groups;"
            " give stats=calibrate(model, batches), and another init for tables."
        )
    return start.moment


def _taken_off(start: Start, down: Tensor, up: Tensor) -> Started:
    root = math.sqrt(start.scaling)
    shapes = start.kind.shapes(start.weight, start.rank)
    a, b = ((t / root).reshape(shape).to(start.weight) for t, shape in zip((down, up), shapes, strict=True))
    return Started(a.contiguous(), b.contiguous(), (a.clone(), b.clone()))


def _plain_matrix(start: Start, who: str) -> Tensor:
    matrix = start.kind.matrix(start.weight)
    if matrix.ndim == 3 and len(matrix) == 1:
        matrix = matrix[0]
    if matrix.ndim != 2 or not start.scaling > 0:
        raise LowRankError(
            f"add_lora_: init {who!r} needs one matrix and a positive scaling, got a weight of shape"
            f" {tuple(start.weight.shape)}; use 'kaiming'."
        )
    return matrix


def _uniform(start: Start, shape: tuple[int, ...], bound: float) -> Tensor:
    values = torch.rand(shape, generator=start.generator, dtype=torch.float32) * 2 - 1
    return (values * bound).to(start.weight)


INITS: dict[str, Callable[[Start], Started]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
    "eva": _eva,
    "corda": _corda,
}
"""Every init by the name that ``add_lora_`` takes."""
