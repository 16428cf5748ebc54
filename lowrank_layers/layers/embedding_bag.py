"""Embedding bags of low rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decompose.pair import truncated_pair
from ..errors import UnsupportedLayerError
from ..rank import Rank, choose_rank, pair_spectrum
from .conversion import adopt, adopt_dense
from .embedding_pair import EmbeddingPair
from .instance_checks import check_dense


class LowRankEmbeddingBag(EmbeddingPair):
    """An embedding bag of rank at most ``rank``: a narrow ``nn.EmbeddingBag`` followed by a linear projection.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        max_norm: every vector with a larger norm is renormalized in place, by scaling its row of ``down``.
        norm_type: the p of that norm.
        scale_grad_by_freq: scales gradients of ``down`` by the inverse frequency of the words in the batch.
        mode: ``"sum"`` or ``"mean"``; a maximum cannot be taken before the projection.
        sparse: makes the gradient of ``down`` sparse.
        include_last_offset: whether ``offsets`` ends with the size of the input.
        padding_idx: index of a vector that is left out of every bag and gets no gradient.
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
    down: nn.EmbeddingBag

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
                "LowRankEmbeddingBag: got mode='max', expected 'sum' or 'mean': a maximum cannot be taken before the"
                " projection; leave this embedding bag dense."
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
        """Returns whether a module is a plain ``nn.EmbeddingBag`` that sums or averages."""
        return type(module) is nn.EmbeddingBag and module.mode != "max"

    @property
    def mode(self) -> str:
        """``"sum"`` or ``"mean"``."""
        return self.down.mode

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Maps ``[B, N]``, or ``[N]`` with ``offsets``, to ``[B, embedding_dim]``."""
        if self.max_norm is not None:
            self._renormalize(input, self.max_norm)
        out: Tensor = self.up(self.down(input, offsets, per_sample_weights))
        return out

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankEmbeddingBag:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``; ``bias`` is ignored."""
        assert isinstance(dense, nn.EmbeddingBag)
        layer = cls(**_bag_settings(dense), device="meta", dtype=dense.weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=dense.weight.device), dense)

    @classmethod
    def from_dense(cls, bag: nn.Module, *, rank: Rank) -> LowRankEmbeddingBag:
        """Factorizes a trained embedding bag by its truncated SVD, the best approximation of that rank.

        Args:
            bag: an ``nn.EmbeddingBag`` of mode ``"sum"`` or ``"mean"``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.EmbeddingBag`` of these modes.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        if type(bag) is nn.EmbeddingBag and bag.mode == "max":
            cls.like(bag, rank=1)  # raises, and says why
        down, up = truncated_pair(check_dense(cls, bag), rank, cls.__name__)
        return cls.from_pair(bag, down, up.mT)

    @classmethod
    def from_pair(cls, bag: nn.Module, down: Tensor, up: Tensor) -> LowRankEmbeddingBag:
        """Builds a layer with the settings of ``bag`` from factors ``[n, r]`` and ``[dim, r]``.

        Args:
            bag: the dense embedding bag.
            down: the factor ``[n, r]`` whose rows are looked up.
            up: the factor ``[dim, r]`` that maps them to the embedding dimension.
        """
        return cls.like(bag, rank=down.shape[1])._filled(bag, down, up)

    def to_dense(self) -> nn.EmbeddingBag:
        """Multiplies the factors out into the ``nn.EmbeddingBag`` that computes the same."""
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

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            text += f", max_norm={self.max_norm}, norm_type={self.norm_type}"
        return text


def _bag_settings(bag: nn.EmbeddingBag) -> dict[str, Any]:
    """Arguments of torch's constructor, read from an embedding bag."""
    names = ["num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"]
    return {name: getattr(bag, name) for name in (*names, "include_last_offset", "padding_idx")}
