"""What the tables share: tolerances, bad ranks, and the settings of hypothesis."""

from __future__ import annotations

import torch
from hypothesis import settings
from torch import Tensor

DERANDOMIZED = settings(deadline=None, derandomize=True, max_examples=40)
"""Settings of every hypothesis test."""

HALVES = [torch.bfloat16, torch.float16]
"""Half-precision dtypes, with the relative errors that a few roundings in them may add up to below."""
HALF_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}

BAD_RANKS = [0, -1, True, 2.5, "a"]


def relative(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in fp64; the shapes must agree."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
