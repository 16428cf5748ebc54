"""Embeddings of low rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..decompose.pair import truncated_pair
from ..rank import Rank, choose_rank, pair_spectrum
from .conversion import adopt, adopt_dense
from .embedding_pair import EmbeddingPair
from .instance_checks import check_dense


class LowRankEmbedding(EmbeddingPair):
    """An embedding of rank at most ``rank``: a narrow ``nn.Embedding`` followed by a linear projection.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        padding_idx: index of a vector that starts at zero and gets no gradient.
        max_norm: every vector with a larger norm is renormalized in place, by scaling its row of ``down``.
        norm_type: the p of that norm.
        scale_grad_by_freq: scales gradients of ``down`` by the inverse frequency of the words in the batch.
        sparse: makes the gradient of ``down`` sparse.
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
        """Maps ``[*]`` of integers to ``[*, embedding_dim]``."""
        if self.max_norm is not None:
            self._renormalize(input, self.max_norm)
        out: Tensor = self.up(self.down(input))
        return out

    def lift_(self) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """Returns the factor with the rows of the vocabulary, and a function that puts a resized one in its place."""

        def restore(resized: nn.Module) -> nn.Module:
            assert isinstance(resized, nn.Embedding)
            self.down, self.num_embeddings = resized, resized.num_embeddings
            return self

        return self.down, restore

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankEmbedding:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``; ``bias`` is ignored."""
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
        """Factorizes a trained embedding by its truncated SVD, the best approximation of that rank.

        Args:
            embedding: an ``nn.Embedding``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.Embedding``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> embedding = nn.Embedding(100, 16, padding_idx=3)
            >>> full = lr.LowRankEmbedding.from_dense(embedding, rank=16)
            >>> full.padding_idx, torch.allclose(full(torch.arange(100)), embedding.weight, atol=1e-5)
            (3, True)
        """
        down, up = truncated_pair(check_dense(cls, embedding), rank, cls.__name__)
        return cls.from_pair(embedding, down, up.mT)

    @classmethod
    def from_pair(cls, embedding: nn.Module, down: Tensor, up: Tensor) -> LowRankEmbedding:
        """Builds a layer with the settings of ``embedding`` from factors ``[n, r]`` and ``[dim, r]``.

        A padding row that is zero stays exactly zero.

        Args:
            embedding: the dense embedding.
            down: the factor ``[n, r]`` whose rows are looked up.
            up: the factor ``[dim, r]`` that maps them to the embedding dimension.
        """
        return cls.like(embedding, rank=down.shape[1])._filled(embedding, down, up)

    def to_dense(self) -> nn.Embedding:
        """Multiplies the factors out into the ``nn.Embedding`` that computes the same."""
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
        """The settings, for ``repr``."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        return text
