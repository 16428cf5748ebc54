"""Embeddings as a thin table and a projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..factors import SVD
from ..rank import Rank, choose_rank
from .base import FactoredModule
from .conversion import adopt, adopt_dense, fill
from .instance_checks import check_dense
from .linear import pair_factors, pair_spectrum, truncated_pair
from .weights import weight_of

Table = TypeVar("Table", bound="ThinEmbedding")


class ThinEmbedding(FactoredModule):
    """What both share: ``down``, a thin table of either kind, and ``up``, the projection of what it gives."""

    down: nn.Embedding | nn.EmbeddingBag
    up: nn.Linear
    norm_type: float

    @property
    def padding_idx(self) -> int | None:
        """The row that gets no gradient, counted from the start."""
        return self.down.padding_idx

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.embedding_dim

    def product(self) -> Tensor:
        """The dense embedding ``[num_embeddings, embedding_dim]``, multiplied out, differentiable."""
        return self.down.weight @ self.up.weight.mT

    def reset_parameters(self) -> None:
        """Draws new weights; vectors have unit variance, as those of a fresh dense table."""
        self.down.reset_parameters()
        bound = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.up.weight, -bound, bound)

    def factors(self) -> SVD:
        """The table ``[num_embeddings, embedding_dim]`` as an SVD."""
        return pair_factors(self.down.weight, self.up.weight.mT)

    @torch.no_grad()
    def _filled(self: Table, dense: nn.Module, thin: Tensor, project: Tensor) -> Table:
        """With these values; a padding row that is zero stays exactly zero."""
        fill(self, [thin, project], None)
        padding = self.padding_idx
        if padding is not None and not bool(weight_of(dense)[padding].any()):
            self.down.weight[padding] = 0
        return self

    @torch.no_grad()
    def _renormalize(self, input: Tensor, max_norm: float) -> None:
        """Scales the thin rows of those vectors whose norm is too large."""
        rows = torch.unique(input)
        thin = self.down.weight[rows]
        norms = torch.linalg.vector_norm(self.up(thin), self.norm_type, dim=-1, keepdim=True)
        self.down.weight[rows] = torch.where(norms > max_norm, thin * max_norm / (norms + 1e-7), thin)


class LowRankEmbedding(ThinEmbedding):
    """Looks up rows of a thin table and projects them: a table of rank at most ``rank``.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        padding_idx: this row starts at zero and gets no gradient.
        max_norm: every vector with a larger norm is renormalized in place (its thin row is scaled).
        norm_type: the p of that norm.
        scale_grad_by_freq: scales the thin table's gradients by the inverse frequency in the batch.
        sparse: makes the thin table's gradient sparse.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner dimension: an integer (clamped to the smaller side) or a rule that needs no weights.

    Shape:
        ``[*]`` of integers to ``[*, embedding_dim]``.

    Attributes:
        down: ``nn.Embedding(num_embeddings, rank, ...)``.
        up: ``nn.Linear(rank, embedding_dim, bias=False)``.

    Raises:
        LowRankError: if the rank is no integer of at least 1 and no rule.

    Examples:
        >>> layer = lr.LowRankEmbedding(50_000, 768, padding_idx=0, rank=64)
        >>> layer(torch.tensor([[1, 2], [0, 3]])).shape
        torch.Size([2, 2, 768])
        >>> bool((layer(torch.tensor([0])) == 0).all())
        True
    """

    dense_type = nn.Embedding
    down: nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        spectrum = pair_spectrum(num_embeddings, embedding_dim, None, type(self).__name__)
        rank = choose_rank(rank, spectrum, min(num_embeddings, embedding_dim))
        self.down = nn.Embedding(
            num_embeddings,
            rank,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            device=device,
            dtype=dtype,
        )
        self.up = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """``[*]`` of integers to ``[*, embedding_dim]``."""
        if self.max_norm is not None:
            self._renormalize(input, self.max_norm)
        out: Tensor = self.up(self.down(input))
        return out

    def lift_(self) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """The thin embedding, which has the rows of the vocabulary, and what takes it back with more or fewer."""

        def restore(resized: nn.Module) -> nn.Module:
            assert isinstance(resized, nn.Embedding)
            self.down, self.num_embeddings = resized, resized.num_embeddings
            return self

        return self.down, restore

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankEmbedding:
        """A layer with the settings, device and dtype of ``dense``, uninitialized; there is never a bias."""
        assert isinstance(dense, nn.Embedding)
        layer = cls(
            dense.num_embeddings,
            dense.embedding_dim,
            dense.padding_idx,
            dense.max_norm,
            dense.norm_type,
            dense.scale_grad_by_freq,
            dense.sparse,
            "meta",
            dense.weight.dtype,
            rank=rank,
        )
        return adopt(layer.to_empty(device=dense.weight.device), dense)

    @classmethod
    def from_dense(cls, embedding: nn.Module, *, rank: Rank) -> LowRankEmbedding:
        """The best thin table and projection of that rank for a trained table: its truncated SVD.

        Args:
            embedding: an ``nn.Embedding``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Embedding``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> table = nn.Embedding(100, 16, padding_idx=3)
            >>> full = lr.LowRankEmbedding.from_dense(table, rank=16)
            >>> full.padding_idx, torch.allclose(full(torch.arange(100)), table.weight, atol=1e-5)
            (3, True)
        """
        table = check_dense(cls, embedding)
        thin, project = truncated_pair(table, rank, cls.__name__)
        return cls.from_pair(embedding, thin, project.mT)

    @classmethod
    def from_pair(cls, embedding: nn.Module, thin: Tensor, project: Tensor) -> LowRankEmbedding:
        """The layer with the settings of ``embedding`` and the given ``[n, r]`` and ``[dim, r]``.

        A padding row that is zero stays exactly zero.
        """
        return cls.like(embedding, rank=thin.shape[1])._filled(embedding, thin, project)

    def to_dense(self) -> nn.Embedding:
        """The ``nn.Embedding`` that computes the same."""
        down = self.down
        dense: nn.Embedding = nn.utils.skip_init(
            nn.Embedding,
            self.num_embeddings,
            self.embedding_dim,
            down.padding_idx,
            self.max_norm,
            self.norm_type,
            down.scale_grad_by_freq,
            down.sparse,
            device=down.weight.device,
            dtype=down.weight.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        adopt_dense(dense, self)
        return dense

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        return text
