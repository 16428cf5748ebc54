"""The rank of a product of two factors that an integer or a rule means."""

from __future__ import annotations

from typing import Any

import torch

from ..decompose.pair import svd_refit
from ..layers import linear_shape
from ..rank import choose_rank, pair_spectrum
from .candidates import Candidate
from .method import Method, factored_like


def pair_rank(method: Method, layer: Candidate, rank: Any, *, pivot: bool = False) -> int:
    """Returns the rank of a layer; a rule sees the weighted spectrum, or refits the weighted matrix.

    Args:
        method: names the layer that it will build, for messages.
        layer: the dense layer.
        rank: an integer or a rank rule.
        pivot: whether rules count the numbers of the pivot form.
    """
    _, rows, columns = linear_shape(layer.module)
    values = None
    if not isinstance(rank, int):
        values = torch.stack([problem.singular_values for problem in layer.problems]).square().mean(0).sqrt()
    owner = type(factored_like(method, layer.module, 1, bias=False)).__name__
    refit = (lambda: svd_refit(layer.problems[0].symmetric_matrix)) if len(layer.problems) == 1 else None
    return choose_rank(rank, pair_spectrum(rows, columns, values, owner, refit, pivot=pivot), min(rows, columns))
