"""Embeddings in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .int8_layer import Int8Layer


class Int8Embedding(Int8Layer, nn.Embedding):  # type: ignore[override]
    """An embedding with a weight in int8, of which only the rows that are looked up are computed.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        padding_idx: index of a vector that starts at zero.
        device: device of the codes.
        dtype: dtype of the vectors.

    Shape:
        ``[*]`` of integers to ``[*, embedding_dim]``.

    Attributes:
        codes: the buffer ``[num_embeddings, embedding_dim]`` in int8.
        scale: the buffer ``[num_embeddings]`` in fp32, by which rows of codes are multiplied.
        weight: the product, computed and read-only.

    Examples:
        >>> embedding = nn.Embedding(1000, 64, padding_idx=0)
        >>> small = lr.Int8Embedding.from_dense(embedding)
        >>> small(torch.tensor([[1, 2], [0, 3]])).shape
        torch.Size([2, 2, 64])
        >>> lr.layer_cost(embedding).bytes, lr.layer_cost(small).bytes
        (256000, 68000)
    """

    dense_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._hold(num_embeddings, embedding_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new vectors as ``nn.Embedding`` does, and rounds them."""
        if self.codes.is_meta:
            return
        new = torch.empty(self.codes.shape, device=self.codes.device).normal_()
        if self.padding_idx is not None:
            new[self.padding_idx] = 0
        self.fill_(new)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[*]`` of integers to ``[*, embedding_dim]``."""
        rows = nn.functional.embedding(input, self.codes)
        rows = rows.double() if self.dtype == torch.float64 else rows
        return (rows * nn.functional.embedding(input, self.scale[:, None])).to(self.dtype)

    @classmethod
    def like(cls, dense: nn.Module, *, rank: None = None, bias: bool | None = None) -> Int8Embedding:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``; ``bias`` is ignored."""
        assert isinstance(dense, nn.Embedding)
        sizes = (dense.num_embeddings, dense.embedding_dim, dense.padding_idx)
        return cls(*sizes, "meta", dense.weight.dtype)._adopted(dense)

    def to_dense(self) -> nn.Embedding:
        """Returns the ``nn.Embedding`` that computes the same."""
        place: dict[str, Any] = {"device": self.codes.device, "dtype": self.dtype}
        sizes = (self.num_embeddings, self.embedding_dim, self.padding_idx)
        dense = self._returned(nn.utils.skip_init(nn.Embedding, *sizes, **place))
        assert isinstance(dense, nn.Embedding)
        return dense
