"""Ranks of Tucker decompositions: of any tensor, mode by mode, and of the two channel modes of a kernel (Tucker-2)."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LowRankError
from ..linalg import full_precision, scaled_to_unit, unfold
from ..rank import Rank, RankRule, Spectrum, WithoutValues, check_rank, choose_rank
from ..rank.size import ParameterFraction
from .ranks import singular_values


def mode_ranks(rank: RankRule | Sequence[Rank | None], tensor: Tensor, owner: str) -> list[int | None]:
    """Turns a rank argument into one rank per mode; ``None`` leaves a mode whole.

    A rule gets the singular values of the unfolding of its mode. Modes with ``ParameterFraction`` shrink in proportion
    to their sizes, given the ranks of the other modes.

    Args:
        rank: one entry per mode, or one rule for all modes.
        tensor: the tensor to decompose.
        owner: name of the caller, for error messages.
    """
    shape = tensor.shape
    each = _one_per_mode(rank, tensor.ndim, owner)
    chosen: list[int | None] = []
    for mode, (r, n) in enumerate(zip(each, shape, strict=True)):
        if r is None or isinstance(r, ParameterFraction):
            chosen.append(None)
            continue
        columns = tensor.numel() // n
        values = None if isinstance(r, int | WithoutValues) else singular_values(unfold(tensor, mode), owner)
        sizes = range(n + columns, (n + columns) * n + 1, n + columns)
        chosen.append(choose_rank(r, Spectrum(values, (n, columns), sizes, tensor.numel(), owner), n))
    shared = {mode: r for mode, r in enumerate(each) if isinstance(r, ParameterFraction)}
    if shared:
        steps = max(shape[mode] for mode in shared)
        path = [_in_proportion(chosen, shape, shared, step / steps) for step in range(1, steps + 1)]
        totals = [_tucker_size(ranks, shape) for ranks in path]
        for mode, fraction in shared.items():
            spectrum = Spectrum(None, (shape[mode], tensor.numel() // shape[mode]), totals, tensor.numel(), owner)
            chosen[mode] = path[fraction(spectrum) - 1][mode]
    return chosen


def tucker_limits(shape: Sequence[int]) -> tuple[int, int]:
    """Returns the largest ranks of use for the two channel modes of a kernel ``[out, in, *k]``."""
    out, in_, area = shape[0], shape[1], math.prod(shape[2:])
    return min(out, in_ * area), min(in_, out * area)


def choose_tucker_rank(rank: Any, shape: tuple[int, ...], kernels: Tensor | None, owner: str) -> tuple[int, int]:
    """Turns a rank argument into ``(rank_out, rank_in)`` for convolution kernels.

    Args:
        rank: two entries or one for both, integers or rules.
        shape: shape ``[out, in, *k]`` of each kernel.
        kernels: stack of the groups' kernels, for rules on singular values; ``None`` where there are no weights yet.
        owner: name of the caller, for error messages.
    """
    both = tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank, rank)
    if len(both) != 2:
        raise LowRankError(f"{owner}: got rank {rank!r}, expected (rank_out, rank_in), one integer or one rule.")
    for each in both:
        check_rank(each, owner)
    path = _proportional_path(shape)
    dense = math.prod(shape)
    limits = tucker_limits(shape)
    chosen = []
    for mode, (each, limit) in enumerate(zip(both, limits, strict=True)):
        if isinstance(each, ParameterFraction):
            sizes = [size for _, size in path]
            chosen.append(path[each(Spectrum(None, (shape[0], shape[1]), sizes, dense, owner)) - 1][0][mode])
            continue
        values = (
            _joint_spectrum(kernels, mode)
            if kernels is not None and not isinstance(each, int | WithoutValues)
            else None
        )
        rows, columns = shape[mode], dense // shape[mode]
        per_rank = range(rows + columns, (rows + columns) * limit + 1, rows + columns)
        chosen.append(choose_rank(each, Spectrum(values, (rows, columns), per_rank, dense, owner), limit))
    return chosen[0], chosen[1]


def _joint_spectrum(kernels: Tensor, mode: int) -> Tensor:
    """Returns the singular values of one mode's unfolding, as the root mean square over the kernels."""
    return torch.stack([tucker_spectrum(kernel, mode) for kernel in kernels]).square().mean(0).sqrt()


def _proportional_path(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], int]]:
    """Returns pairs of ranks in proportion to the channels, from small to large, each with its parameter count."""
    out, in_, area = shape[0], shape[1], math.prod(shape[2:])
    top = tucker_limits(shape)
    steps = max(top)
    pairs = [tuple(max(1, round(limit * step / steps)) for limit in top) for step in range(1, steps + 1)]
    return [((a, b), a * out + b * in_ + a * b * area) for a, b in pairs]


@full_precision
def tucker_spectrum(tensor: Tensor, mode: int) -> Tensor:
    """Returns the singular values of one unfolding in fp64, largest first."""
    matrix, scale = scaled_to_unit(unfold(tensor, mode).double())
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0).sqrt() * scale


def _one_per_mode(rank: object, ndim: int, owner: str) -> list[Rank | None]:
    """Returns one rank, rule or ``None`` per mode, or raises."""
    if not isinstance(rank, Sequence) or isinstance(rank, str):
        if isinstance(rank, int | float | str | type) or not callable(rank):
            raise LowRankError(
                f"{owner}: got rank {rank!r}, expected one entry per mode, as in {(1,) * ndim}, or one rule for all;"
                " None leaves a mode whole."
            )
        return [rank] * ndim
    if len(rank) != ndim:
        raise LowRankError(f"{owner}: got {len(rank)} ranks for {ndim} modes; None leaves a mode whole.")
    for r in rank:
        if r is not None:
            check_rank(r, owner)
    return list(rank)


def _in_proportion(
    fixed: Sequence[int | None], shape: Sequence[int], shared: Container[int], part: float
) -> list[int | None]:
    """Gives each shared mode that part of its size as a rank; the others keep theirs."""
    return [max(1, round(part * shape[mode])) if mode in shared else r for mode, r in enumerate(fixed)]


def _tucker_size(ranks: Sequence[int | None], shape: Sequence[int]) -> int:
    """Number of values in the core and the factors of a Tucker decomposition."""
    core = math.prod(n if r is None else r for r, n in zip(ranks, shape, strict=True))
    return core + sum(r * n for r, n in zip(ranks, shape, strict=True) if r is not None)
