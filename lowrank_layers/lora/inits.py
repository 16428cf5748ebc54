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
from ..rank import Spectrum
from .weight_layout import Kind

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora-ga", "loftq"]

_GAMMA = 16
_GIVE_GRADIENTS = "gradients=weight_gradients(model, batches, loss)"
_GIVE_REFERENCE = "reference= the model, or state dict, before quantising"


@dataclass(frozen=True)
class Start:
    """What an init may look at: the frozen weight, its layout, the rank, the scaling, a generator, ``E[x x^T]``, the
    weight's gradient, the weight before it was quantised, the dtype of the adapter, and whether rows of the weight are
    looked up: then ``A`` is zero in place of ``B``, so that rows which never occur stay as they are.
    """

    weight: Tensor
    kind: Kind
    rank: int
    scaling: float
    generator: torch.Generator | None
    moment: Tensor | None = None
    gradient: Tensor | None = None
    reference: Tensor | None = None
    dtype: torch.dtype = torch.float32
    lookup: bool = False

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """A factor that starts at zero."""
        return torch.zeros(shape, dtype=self.dtype, device=self.weight.device)

    def placed(self, values: Tensor) -> Tensor:
        """A factor with these values, on the device of the weight and in the dtype of the adapter."""
        return values.to(self.weight.device, self.dtype)


class Started(NamedTuple):
    """``A``, ``B``, and the frozen copies whose product is taken off, where that of ``B A`` is not zero."""

    a: Tensor
    b: Tensor
    taken_off: tuple[Tensor, Tensor] | None = None

    def whole(self, weight: Tensor, kind: Kind, scaling: float) -> Tensor:
        """The weight that the adapted one starts as, in fp32."""
        if self.taken_off is not None:
            return weight.float()
        return weight.float() + scaling * kind.product(self.a.float(), self.b.float())


def _kaiming(start: Start) -> Started:
    """``A`` as a fresh linear layer, ``B`` zero; for an embedding ``A`` zero, ``B`` as a fresh embedding."""
    a, b = start.kind.shapes(start.weight, start.rank)
    if start.lookup:
        return Started(start.zeros(a), start.placed(torch.randn(b, generator=start.generator, dtype=torch.float32)))
    bound = 1 / math.sqrt(start.kind.matrix(start.weight).shape[-1])
    values = torch.rand(a, generator=start.generator, dtype=torch.float32) * 2 - 1
    return Started(start.placed(values * bound), start.zeros(b))


def _gaussian(start: Start) -> Started:
    """``A`` normal with deviation ``1 / rank``, ``B`` zero; an embedding as in ``"kaiming"``."""
    if start.lookup:
        return _kaiming(start)
    a, b = start.kind.shapes(start.weight, start.rank)
    values = torch.randn(a, generator=start.generator, dtype=torch.float32) / start.rank
    return Started(start.placed(values), start.zeros(b))


def _orthogonal(start: Start) -> Started:
    """``A`` with orthonormal rows in every group, ``B`` zero; of an embedding ``B`` with orthonormal columns."""
    a, b = start.kind.shapes(start.weight, start.rank)
    if start.lookup:
        return Started(start.zeros(a), start.placed(torch.linalg.qr(torch.randn(b, generator=start.generator)).Q))
    width = start.kind.matrix(start.weight).shape[-1]
    normal = torch.randn(math.prod(a) // (width * start.rank), width, start.rank, generator=start.generator)
    return Started(start.placed(torch.linalg.qr(normal).Q.mT.reshape(a)).contiguous(), start.zeros(b))


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
    return Started(start.placed(rows.reshape(a)).contiguous(), start.zeros(b))


def _corda(start: Start) -> Started:
    """The leading triplets of ``W C``, taken back by ``C^-1``, with ``C = E[x x^T]`` (Yang et al., 2024)."""
    root = psd_root(damp(_moment(start, "corda"), 1e-3))
    moment = root.factor.mT @ root.factor
    f = svd(_plain_matrix(start, "corda").double() @ moment, start.rank)
    up, down = f.pair()
    return _taken_off(start, root.solve(down.mT).mT, up)


def _lora_ga(start: Start) -> Started:
    """``A`` from the leading ``r`` right singular vectors of the gradient, ``B`` from the next ``r`` left ones.

    A small step of plain gradient descent then moves the weight along the best approximation of rank ``2 r`` of its
    gradient: of that, ``B A'`` is the part of the rows of ``A``, ``B' A`` that of the columns of ``B``. Both have the
    paper's size ``d_out^(1/4) / sqrt(gamma)``, ``gamma = 16`` (Wang et al., 2024, algorithm 1).
    """
    gradient = _same_shape(start, start.gradient, "lora-ga", _GIVE_GRADIENTS)
    matrix = start.kind.matrix(gradient)
    if 2 * start.rank > min(matrix.shape[-2:]):
        raise LowRankError(
            f"add_lora_: init 'lora-ga' takes 2 x {start.rank} directions, and a weight of shape"
            f" {tuple(start.weight.shape)} has {min(matrix.shape[-2:])}; leave it out with exclude=."
        )
    up, _, down = triplets(matrix, 2 * start.rank)
    size = matrix.shape[-2] ** 0.25 / math.sqrt(_GAMMA)
    a, b = _pair(start, size * down[..., : start.rank, :], size * up[..., start.rank :])
    return Started(a, b, (a.clone(), b.clone()))


def _loftq(start: Start) -> Started:
    """The best approximation of what quantising took from the weight; it stays on (Li et al., 2023, algorithm 1)."""
    reference = _same_shape(start, start.reference, "loftq", _GIVE_REFERENCE)
    if not start.scaling > 0:
        raise LowRankError(f"add_lora_: init 'loftq' needs a positive scaling, got {start.scaling}.")
    up, values, down = triplets(start.kind.matrix(reference - start.weight.to(reference)), start.rank)
    roots = (values / start.scaling).sqrt()
    # where nothing was taken, one of the two has to be other than zero to learn
    a, b = _pair(start, torch.where(roots > 0, roots, 1)[..., None] * down, up * roots[..., None, :])
    return Started(a, b)


def _same_shape(start: Start, tensor: Tensor | None, who: str, remedy: str) -> Tensor:
    """The tensor that belongs to the weight, in fp32 at least."""
    if tensor is None or tensor.shape != start.weight.shape:
        got = "nothing" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise LowRankError(
            f"add_lora_: init {who!r} needs a tensor for every weight, and for one of shape"
            f" {tuple(start.weight.shape)} there is {got}; give {remedy}."
        )
    return tensor.to(start.weight.device, torch.promote_types(tensor.dtype, torch.float32))


def triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``U [..., out, r]``, ``S [..., r]``, ``Vh [..., r, in]`` of a matrix, or of each of a stack."""
    parts = [svd(each, rank) for each in matrix.reshape(-1, *matrix.shape[-2:])]
    u, s, vh = (torch.stack(sides) for sides in zip(*((part.u, part.s, part.vh) for part in parts), strict=True))
    return (u, s, vh) if matrix.ndim == 3 else (u[0], s[0], vh[0])


def _moment(start: Start, who: str) -> Tensor:
    if start.moment is None or start.moment.ndim != 2:
        raise LowRankError(
            f"add_lora_: init {who!r} needs the input moments of a linear layer or a convolution without groups;"
            " give stats=calibrate(model, batches), and another init for tables."
        )
    return start.moment


def limit_of(init: str, start: Start) -> int:
    """The largest rank that an init can give a weight."""
    limit = start.kind.limit(start.weight)
    return max(1, limit // 2) if init == "lora-ga" else limit


def spectrum_of(init: str, start: Start, who: str) -> Spectrum:
    """What a rank rule reads: the singular values of what the init takes its directions from.

    That is the inputs for EVA, ``W C`` for CorDA, the gradient for LoRA-GA, what quantising took for LoftQ, and the
    weight for every other; of a stack of matrices the root mean squares.
    """
    if init == "eva":
        values = torch.linalg.eigvalsh(_moment(start, "eva")).flip(0).clamp_min(0).sqrt()
    else:
        if init == "corda":
            matrix = _plain_matrix(start, "corda").double() @ damp(_moment(start, "corda"), 1e-3)
        elif init == "lora-ga":
            matrix = start.kind.matrix(_same_shape(start, start.gradient, "lora-ga", _GIVE_GRADIENTS))
        elif init == "loftq":
            reference = _same_shape(start, start.reference, "loftq", _GIVE_REFERENCE)
            matrix = start.kind.matrix(reference - start.weight.to(reference))
        else:
            matrix = start.kind.matrix(start.weight)
        values = torch.linalg.svdvals(matrix.double()).reshape(-1, min(matrix.shape[-2:])).square().mean(0).sqrt()
    limit = start.kind.limit(start.weight)
    step = sum(math.prod(shape) for shape in start.kind.shapes(start.weight, 1))
    *_, rows, columns = start.kind.matrix(start.weight).shape
    return Spectrum(values[:limit], (rows, columns), range(step, step * limit + 1, step), start.weight.numel(), who)


def _taken_off(start: Start, down: Tensor, up: Tensor) -> Started:
    root = math.sqrt(start.scaling)
    a, b = _pair(start, down / root, up / root)
    return Started(a, b, (a.clone(), b.clone()))


def _pair(start: Start, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    a, b = start.kind.pair(start.weight, down, up)
    return start.placed(a).contiguous(), start.placed(b).contiguous()


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


INITS: dict[str, Callable[[Start], Started]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
    "eva": _eva,
    "corda": _corda,
    "lora-ga": _lora_ga,
    "loftq": _loftq,
}
"""Every init by the name that ``add_lora_`` takes."""
