"""Random tensors of known ranks, for the tests of decompositions."""

from __future__ import annotations

import torch

from ..contracts.tables import generator


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def distance_from_orthonormal(matrix: torch.Tensor) -> float:
    gram = matrix.double().mT @ matrix.double()
    return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(randn(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(randn(columns, len(values), seed=seed + 1)).Q
    return (left * values.double()) @ right.mT


def low_cp_rank(shape: tuple[int, ...], rank: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """A tensor of exactly that rank with components of different sizes."""
    columns = [randn(n, rank, seed=seed + k) for k, n in enumerate(shape)]
    columns[0] = columns[0] * torch.linspace(2, 1, rank, dtype=torch.float64)
    letters = "abcdef"[: len(shape)]
    return torch.einsum(f"{','.join(f'{x}r' for x in letters)}->{letters}", *columns).to(dtype)


def low_tucker_rank(shape: tuple[int, ...], rank: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    tensor = randn(*rank, seed=seed)
    for mode, n in enumerate(shape):
        factor = torch.linalg.qr(randn(n, rank[mode], seed=seed + mode + 1)).Q if n != rank[mode] else torch.eye(n)
        tensor = torch.tensordot(factor.double(), tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor
