"""The errors that ALDS compares between layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .candidates import Candidate
from .method import Option


def spectral_errors(layer: Candidate, options: Iterable[Option]) -> list[float]:
    r"""Relative error of each option of a pair of factors in the spectral norm, :math:`s_{r+1} / s_1`; 0 when dense.

    It is ``||W - W_r||_2 / ||W||_2``, the worst case over inputs, of the weighted matrix where there are statistics,
    and of the worst group. ALDS minimises its maximum over the layers (Liebenwein, Maalouf, Gal, Feldman and Rus,
    "Compressing Neural Networks: Towards Determining the Optimal Layer-wise Decomposition", 2021).

    Args:
        layer: the layer.
        options: its options by :class:`SVDMethod`, or dense.
    """
    squares = torch.stack([-tails.diff() for tails in layer.tails]).clamp_min(0)
    worst = [*(squares / squares[:, :1].clamp_min(1e-300)).amax(0).sqrt().tolist(), 0.0]
    return [0.0 if option.rank is None else worst[option.rank] for option in options]
