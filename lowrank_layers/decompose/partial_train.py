"""Tensor trains of tensors in which some entries may take any value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .tensor_train import tensor_trains


def trains_of_known(tensor: Tensor, known: Tensor, ranks: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
    """Decomposes a tensor into one tensor train for each of several ranks; unknown entries may take any value.

    All cores but the first are those of the slices (along the first mode) that are known entirely. The first core's row
    of any other slice is the least-squares solution for its known entries. So a train is recovered from its known
    entries if at least as many slices as its first rank are known entirely. The TT-SVD with zeros in place of unknown
    entries is returned where its error on the known entries is smaller.

    Args:
        tensor: the tensor, in the dtype to compute in; zero where it is not known.
        known: boolean tensor of the same shape.
        ranks: bond ranks of each train, as in :func:`tensor_trains`.

    Shape:
        ``[m_1, ..., m_d]`` to cores ``[r_{k-1}, m_k, r_k]`` with ``r_0 = r_d = 1``.
    """
    complete = known.flatten(1).all(1)
    # the slices that are known entirely have to be at least as many as the first bond rank
    held = [rank for rank in ranks if rank[0] <= int(complete.sum())]
    continued = tensor_trains(tensor[complete], held) if held else iter(())
    rounding = 16 * torch.finfo(tensor.dtype).eps * float(torch.linalg.vector_norm(tensor))
    for rank, filled in zip(ranks, tensor_trains(tensor, ranks), strict=True):
        candidates = [filled]
        if rank in held:
            candidates.append(_with_first_core(next(continued), tensor, known, complete))
        lost = [float(torch.linalg.vector_norm((_product(cores) - tensor)[known])) for cores in candidates]
        yield filled if lost[0] <= max(min(lost), rounding) else candidates[1]


def _with_first_core(cores: list[Tensor], tensor: Tensor, known: Tensor, complete: Tensor) -> list[Tensor]:
    """Extends the train of the entirely known slices to all slices, by least squares for the first core."""
    rest = _product([cores[1].flatten(0, 1)[None], *cores[2:]]).reshape(cores[1].shape[0], -1)
    first = rest.new_zeros(len(tensor), len(rest))
    first[complete] = cores[0][0]
    mask = inverse = None
    for k in (~complete).nonzero().flatten().tolist():
        slice_, own = tensor[k].flatten(), known[k].flatten()
        if mask is None or not torch.equal(own, mask):
            mask = own
            # directions that these entries hardly see stay out
            inverse = torch.linalg.pinv(rest[:, mask].double(), rtol=100 * torch.finfo(tensor.dtype).eps)
        assert inverse is not None
        first[k] = (slice_[mask].double() @ inverse).to(first)
    return [first[None], *cores[1:]]


def _product(cores: Sequence[Tensor]) -> Tensor:
    """Multiplies out a train: the tensor ``[m_1, ..., m_d]``."""
    left = cores[0]
    for core in cores[1:]:
        left = torch.tensordot(left, core, dims=1)
    return left.squeeze(0).squeeze(-1)
