"""Base class of the low-rank embedding and embedding bag."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..decompose.pair import pair_factors
from ..factors import SVD
from .base import FactoredModule
from .conversion import fill
from .weights import weight_of

Self = TypeVar("Self", bound="EmbeddingPair")


class EmbeddingPair(FactoredModule):
    """An embedding or embedding bag of few columns, ``down``, followed by a linear projection, ``up``."""

    down: nn.Embedding | nn.EmbeddingBag
    up: nn.Linear
    norm_type: float

    @property
    def padding_idx(self) -> int | None:
        """Index of the row that gets no gradient, counted from the start."""
        return self.down.padding_idx

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.embedding_dim

    def product(self) -> Tensor:
        """Multiplies out the dense weight ``[num_embeddings, embedding_dim]``, differentiably."""
        return self.down.weight @ self.up.weight.mT

    def reset_parameters(self) -> None:
        """Draws new weights such that vectors have unit variance, as those of a new dense embedding do."""
        self.down.reset_parameters()
        bound = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.up.weight, -bound, bound)

    def factors(self) -> SVD:
        """The weight ``[num_embeddings, embedding_dim]`` as an SVD."""
        return pair_factors(self.down.weight, self.up.weight.mT)

    @torch.no_grad()
    def _filled(self: Self, dense: nn.Module, down: Tensor, up: Tensor) -> Self:
        """Copies factors into the layer; a padding row that is zero stays exactly zero."""
        fill(self, [down, up], None)
        padding = self.padding_idx
        if padding is not None and not bool(weight_of(dense)[padding].any()):
            self.down.weight[padding] = 0
        return self

    @torch.no_grad()
    def _renormalize(self, input: Tensor, max_norm: float) -> None:
        """Scales the rows of ``down`` of those vectors whose norm is above ``max_norm``."""
        rows = torch.unique(input)
        down = self.down.weight[rows]
        norms = torch.linalg.vector_norm(self.up(down), self.norm_type, dim=-1, keepdim=True)
        self.down.weight[rows] = torch.where(norms > max_norm, down * max_norm / (norms + 1e-7), down)
