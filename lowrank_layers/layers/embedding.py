"""Embeddings as a thin table and a projection."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayerError
from ..factors import SVD
from ..rank import Rank, choose_rank
from .base import FactoredModule, adopt, adopt_dense, check_dense, fill, weight_of
from .linear import pair_factors, pair_spectrum, truncated_pair


class LowRankEmbedding(FactoredModule):
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

    @property
    def padding_idx(self) -> int | None:
        """The row that gets no gradient, counted from the start."""
        return self.down.padding_idx

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The dense table ``[num_embeddings, embedding_dim]``, multiplied out on every access, differentiable."""
        return self.down.weight @ self.up.weight.mT

    def reset_parameters(self) -> None:
        """Draws new weights; vectors have unit variance, as those of a fresh ``nn.Embedding``."""
        _reset(self)

    def forward(self, input: Tensor) -> Tensor:
        """``[*]`` of integers to ``[*, embedding_dim]``."""
        if self.max_norm is not None:
            renormalize_(self, input, self.max_norm)
        out: Tensor = self.up(self.down(input))
        return out

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
        return _fill(cls.like(embedding, rank=thin.shape[1]), embedding, thin, project)

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

    def factors(self) -> SVD:
        """The table ``[num_embeddings, embedding_dim]`` as an SVD."""
        return pair_factors(self.down.weight, self.up.weight.mT)

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        return text


class LowRankEmbeddingBag(FactoredModule):
    """Sums or averages rows of a thin table and projects the result: a table of rank at most ``rank``.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        max_norm: every vector with a larger norm is renormalized in place (its thin row is scaled).
        norm_type: the p of that norm.
        scale_grad_by_freq: scales the thin table's gradients by the inverse frequency in the batch.
        mode: ``"sum"`` or ``"mean"``; the maximum does not pass through a projection.
        sparse: makes the thin table's gradient sparse.
        include_last_offset: whether ``offsets`` ends with the size of the input.
        padding_idx: this row is left out of every bag and gets no gradient.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner dimension: an integer (clamped to the smaller side) or a rule that needs no weights.

    Shape:
        ``[B, N]``, or ``[N]`` with ``offsets [B]``, to ``[B, embedding_dim]``.

    Attributes:
        down: ``nn.EmbeddingBag(num_embeddings, rank, ...)``.
        up: ``nn.Linear(rank, embedding_dim, bias=False)``.

    Raises:
        UnsupportedLayerError: for ``mode="max"``.
        LowRankError: if the rank is no integer of at least 1 and no rule.

    Examples:
        >>> bag = lr.LowRankEmbeddingBag(1000, 64, mode="sum", rank=8)
        >>> bag(torch.tensor([1, 2, 4, 5, 4, 3]), offsets=torch.tensor([0, 4])).shape
        torch.Size([2, 64])
    """

    dense_type = nn.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
    ) -> None:
        super().__init__()
        if mode == "max":
            raise UnsupportedLayerError(
                "LowRankEmbeddingBag: got mode='max', expected 'sum' or 'mean': the maximum does not pass through a"
                " projection; leave the table dense."
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.max_norm = max_norm
        self.norm_type = norm_type
        spectrum = pair_spectrum(num_embeddings, embedding_dim, None, type(self).__name__)
        rank = choose_rank(rank, spectrum, min(num_embeddings, embedding_dim))
        self.down = nn.EmbeddingBag(
            num_embeddings,
            rank,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
        self.up = nn.Linear(rank, embedding_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether this is an ``nn.EmbeddingBag`` that sums or averages."""
        return type(module) is nn.EmbeddingBag and module.mode != "max"

    @property
    def padding_idx(self) -> int | None:
        """The row that is left out, counted from the start."""
        return self.down.padding_idx

    @property
    def mode(self) -> str:
        """``"sum"`` or ``"mean"``."""
        return self.down.mode

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.embedding_dim

    @property
    def weight(self) -> Tensor:
        """The dense table ``[num_embeddings, embedding_dim]``, multiplied out on every access, differentiable."""
        return self.down.weight @ self.up.weight.mT

    def reset_parameters(self) -> None:
        """Draws new weights; vectors have unit variance, as those of a fresh ``nn.EmbeddingBag``."""
        _reset(self)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """``[B, N]``, or ``[N]`` with ``offsets``, to ``[B, embedding_dim]``."""
        if self.max_norm is not None:
            renormalize_(self, input, self.max_norm)
        out: Tensor = self.up(self.down(input, offsets, per_sample_weights))
        return out

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankEmbeddingBag:
        """A layer with the settings, device and dtype of ``dense``, uninitialized; there is never a bias."""
        assert isinstance(dense, nn.EmbeddingBag)
        layer = cls(**_bag_settings(dense), device="meta", dtype=dense.weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=dense.weight.device), dense)

    @classmethod
    def from_dense(cls, bag: nn.Module, *, rank: Rank) -> LowRankEmbeddingBag:
        """The best thin table and projection of that rank for a trained table: its truncated SVD.

        Args:
            bag: an ``nn.EmbeddingBag`` of mode ``"sum"`` or ``"mean"``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: for anything else.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        if type(bag) is nn.EmbeddingBag and bag.mode == "max":
            cls.like(bag, rank=1)  # says why
        table = check_dense(cls, bag)
        thin, project = truncated_pair(table, rank, cls.__name__)
        return cls.from_pair(bag, thin, project.mT)

    @classmethod
    def from_pair(cls, bag: nn.Module, thin: Tensor, project: Tensor) -> LowRankEmbeddingBag:
        """The layer with the settings of ``bag`` and the given ``[n, r]`` and ``[dim, r]``."""
        return _fill(cls.like(bag, rank=thin.shape[1]), bag, thin, project)

    def to_dense(self) -> nn.EmbeddingBag:
        """The ``nn.EmbeddingBag`` that computes the same."""
        weight = self.weight.detach()
        settings = {**_bag_settings(self.down), "embedding_dim": self.embedding_dim}
        settings |= {"max_norm": self.max_norm, "norm_type": self.norm_type}
        dense: nn.EmbeddingBag = nn.utils.skip_init(
            nn.EmbeddingBag, **settings, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> SVD:
        """The table ``[num_embeddings, embedding_dim]`` as an SVD."""
        return pair_factors(self.down.weight, self.up.weight.mT)

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        return text


Table = TypeVar("Table", LowRankEmbedding, LowRankEmbeddingBag)


def _bag_settings(bag: nn.EmbeddingBag) -> dict[str, Any]:
    names = ["num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"]
    return {name: getattr(bag, name) for name in (*names, "include_last_offset", "padding_idx")}


def _reset(layer: LowRankEmbedding | LowRankEmbeddingBag) -> None:
    layer.down.reset_parameters()
    bound = math.sqrt(3 / layer.rank)
    nn.init.uniform_(layer.up.weight, -bound, bound)


def _fill(layer: Table, dense: nn.Module, thin: Tensor, project: Tensor) -> Table:
    """A padding row that is zero stays exactly zero."""
    fill(layer, [thin, project], None)
    padding = layer.padding_idx
    if padding is not None and not bool(weight_of(dense)[padding].any()):
        with torch.no_grad():
            layer.down.weight[padding] = 0
    return layer


@torch.no_grad()
def renormalize_(layer: LowRankEmbedding | LowRankEmbeddingBag, input: Tensor, max_norm: float) -> None:
    """Scales the thin rows of those vectors whose norm is too large."""
    rows = torch.unique(input)
    thin = layer.down.weight[rows]
    norms = torch.linalg.vector_norm(layer.up(thin), layer.norm_type, dim=-1, keepdim=True)
    layer.down.weight[rows] = torch.where(norms > max_norm, thin * max_norm / (norms + 1e-7), thin)
