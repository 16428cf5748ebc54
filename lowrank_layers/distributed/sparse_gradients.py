"""Sparse gradients, which are averaged uncompressed."""

from __future__ import annotations

from torch import Tensor, nn


def dense_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters with dense gradients, by name; sparse ones are told as ``DistributedDataParallel`` tells them."""
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse)
    sparse = {id(p) for embedding in embeddings for p in embedding.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) not in sparse}


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; for a sparse one, the bytes of its indices and values."""
    if tensor.is_sparse:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes
