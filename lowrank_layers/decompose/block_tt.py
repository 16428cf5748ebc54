"""Block tensor trains of matrices, such as the weight of an embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..linalg import scaled_to_unit, working_dtype
from .bonds import Bonds
from .digits import Split, tensorize
from .partial_train import trains_of_known
from .tensor_train import tensor_trains


def block_trains(
    matrix: Tensor,
    split: Split,
    bonds: Sequence[Bonds],
    *,
    scales: Sequence[Tensor] | None = None,
    free_row: int | None = None,
) -> Iterator[list[Tensor]]:
    """Decomposes a matrix into one block tensor train for each of several bonds, by TT-SVD (Oseledets, 2011).

    Args:
        matrix: ``[n, d]``.
        split: sizes of its digits.
        bonds: bond ranks, one tuple per train.
        scales: positive weights ``[n_k, d_k]`` per digit; the error is that of the matrix times their product, and the
            cores are divided by them again.
        free_row: a row that may take any value, such as a padding row; rows that only fill up the digits always may.

    Returns:
        An iterator over the trains, as lists of cores ``[r_{k-1}, n_k, d_k, r_k]``.
    """
    tensor = tensorize(matrix.to(working_dtype(matrix)), split)
    for k, scale in enumerate(scales or ()):
        tensor = tensor * scale.to(tensor).flatten().reshape(-1, *[1] * (tensor.ndim - 1 - k))
    known = torch.ones(len(matrix), 1, dtype=torch.bool, device=matrix.device)
    if free_row is not None:
        known[free_row] = False
    if free_row is None and len(matrix) == math.prod(split[0]):
        trains = tensor_trains(tensor, bonds)
    else:
        trains = trains_of_known(tensor, tensorize(known.expand(matrix.shape), split), bonds)
    for train in trains:
        cores = [core.unflatten(1, sizes) for core, sizes in zip(train, zip(*split, strict=True), strict=True)]
        if scales is not None:
            cores = [core / scale.to(core)[None, ..., None] for core, scale in zip(cores, scales, strict=True)]
        yield cores


def balanced_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same train in fp64 with cores of equal norms."""
    parts = [scaled_to_unit(core.double()) for core in cores]
    norms = [torch.linalg.vector_norm(core) * unit for core, unit in parts]
    even = math.prod((norm ** (1 / len(cores)) for norm in norms), start=torch.ones_like(norms[0]))
    scales = [torch.where(norm > 0, even / norm, 0) for norm in norms]
    return [core.double() * scale for core, scale in zip(cores, scales, strict=True)]
