"""Embeddings whose weight is a block tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose.block_tt import balanced_cores, block_trains
from ..decompose.bonds import BondRank, choose_bonds
from ..decompose.digits import Split, check_split, split_digits
from ..errors import LowRankError, UnsupportedLayerError
from ..factors import BlockTT
from ..linalg import full_precision, train_product
from .base import FactoredModule
from .conversion import adopt, adopt_dense, fill
from .instance_checks import check_dense
from .weights import weight_of


class TensorizedEmbedding(FactoredModule):
    r"""An embedding whose weight is a block tensor train: a few small cores in place of one large matrix.

    Row and column indices are written in mixed radix, :math:`i = (i_1, \dots, i_K)` and :math:`j = (j_1, \dots, j_K)`,
    and an entry of the weight is the product of small matrices :math:`G_1[i_1, j_1] \cdots G_K[i_K, j_K]` (Novikov et
    al., 2015; Khrulkov et al., 2020). Unlike a pair of factors, such an embedding can have full matrix rank with very
    few parameters, but it needs structure along the digits, which a vocabulary in arbitrary order may not have. Rows
    are filled up to :math:`n_1 \cdots n_K \ge n`, the smallest such product of nearly equal factors; columns are split
    exactly, so a prime dimension has digits of size 1 but for one.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        padding_idx: index of a vector that is always zero and gets no gradient.
        max_norm: only ``None``, since vectors share cores and cannot be renormalized one by one.
        norm_type: the p of that norm; kept for ``to_dense``.
        scale_grad_by_freq: only ``False``, since the frequency of a row is not that of its digits.
        sparse: only ``False``, since nearly every batch touches most rows of all cores.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: bond ranks: one integer for all bonds, ``order - 1`` integers, or ``ParameterFraction``. Integers are
            clamped to the largest that is of use.
        order: number of cores.
        split: sizes of the digits, ``((n_1, ..., n_K), (d_1, ..., d_K))``, in place of ``order``.

    Shape:
        ``[*]`` of integers to ``[*, embedding_dim]``.

    Attributes:
        core0, core1, ...: ``nn.Embedding(n_k, r_{k-1} * d_k * r_k)``, the slowest digit first.

    Raises:
        UnsupportedLayerError: for ``max_norm``, ``scale_grad_by_freq`` and ``sparse``.
        LowRankError: for bad ranks, orders and splits.

    Examples:
        >>> layer = lr.TensorizedEmbedding(50_000, 768, padding_idx=0, rank=32)
        >>> layer(torch.tensor([[1, 2], [0, 3]])).shape
        torch.Size([2, 2, 768])
        >>> layer.split, sum(p.numel() for p in layer.parameters())
        (((37, 37, 37), (8, 8, 12)), 326784)
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
        rank: BondRank,
        order: int = 3,
        split: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        _refuse(max_norm, scale_grad_by_freq, sparse)
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise LowRankError(
                    f"TensorizedEmbedding: got padding_idx {padding_idx}, expected one of the {num_embeddings} rows."
                )
            padding_idx %= num_embeddings
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.split = _split(num_embeddings, embedding_dim, order, split)
        bonds = choose_bonds(rank, self.split, num_embeddings * embedding_dim, "TensorizedEmbedding")
        self._bonds = (1, *bonds, 1)
        for k, (n, d) in enumerate(zip(*self.split, strict=True)):
            width = self._bonds[k] * d * self._bonds[k + 1]
            self.add_module(f"core{k}", nn.Embedding(n, width, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Returns whether a module is an ``nn.Embedding`` without ``max_norm``, ``scale_grad_by_freq``, ``sparse``."""
        if type(module) is not nn.Embedding:
            return False
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse

    @property
    def rank(self) -> tuple[int, ...]:
        """The bond ranks between the cores."""
        return self._bonds[1:-1]

    @property
    def form(self) -> dict[str, Any]:
        """The order or the split, unless it is the default."""
        order = len(self.split[0])
        if self.split != _split(self.num_embeddings, self.embedding_dim, order):
            return {"split": [list(side) for side in self.split]}
        return {} if order == 3 else {"order": order}

    def cores(self) -> list[Tensor]:
        """Returns the cores ``[r_{k-1}, n_k, d_k, r_k]``, differentiable."""
        return [
            weight_of(child).unflatten(1, (self._bonds[k], d, self._bonds[k + 1])).transpose(0, 1)
            for k, (child, d) in enumerate(zip(self.parts, self.split[1], strict=True))
        ]

    def product(self) -> Tensor:
        """The dense embedding ``[num_embeddings, embedding_dim]``, multiplied out, differentiable."""
        weight = train_product(self.cores())[: self.num_embeddings]
        if self.padding_idx is not None:
            rows = torch.arange(self.num_embeddings, device=weight.device)
            weight = weight.masked_fill((rows == self.padding_idx)[:, None], 0)
        return weight

    def reset_parameters(self) -> None:
        """Draws new weights such that vectors have unit variance, as those of a new ``nn.Embedding`` do."""
        for child, bond in zip(self.parts, self._bonds, strict=False):
            nn.init.uniform_(weight_of(child), -math.sqrt(3 / bond), math.sqrt(3 / bond))

    def forward(self, input: Tensor) -> Tensor:
        """``[*]`` of integers to ``[*, embedding_dim]``."""
        slices = [child(digit) for child, digit in zip(self.parts, self._digits(input), strict=True)]
        out: Tensor = slices[0].unflatten(-1, (self.split[1][0], self._bonds[1]))
        for k in range(1, len(slices)):
            out = out @ slices[k].unflatten(-1, (self._bonds[k], -1))
            out = out.unflatten(-1, (self.split[1][k], self._bonds[k + 1])).flatten(-3, -2)
        out = out.squeeze(-1)
        if self.padding_idx is not None:
            out = out.masked_fill((input == self.padding_idx)[..., None], 0)
        return out

    def _digits(self, index: Tensor) -> list[Tensor]:
        """Writes indices in mixed radix; one out of range gets a first digit out of range, which its core refuses."""
        sizes = self.split[0]
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        first = index // strides[0]
        if math.prod(sizes) > self.num_embeddings:
            first = torch.where(index < self.num_embeddings, first, sizes[0])
        return [first, *(index // stride % n for stride, n in zip(strides[1:], sizes[1:], strict=True))]

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates per sample for the products of the cores' slices."""
        columns, bonds = self.split[1], self._bonds
        each = (math.prod(columns[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(1, len(columns)))
        return math.prod(input_shape) * sum(each)

    @classmethod
    def like(
        cls,
        dense: nn.Module,
        *,
        rank: Any,
        bias: bool | None = None,
        order: int = 3,
        split: Sequence[Sequence[int]] | None = None,
    ) -> TensorizedEmbedding:
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
            order=order,
            split=split,
        )
        return adopt(layer.to_empty(device=dense.weight.device), dense)

    @classmethod
    @full_precision
    def from_dense(
        cls, embedding: nn.Module, *, rank: BondRank, order: int = 3, split: Sequence[Sequence[int]] | None = None
    ) -> TensorizedEmbedding:
        """Decomposes a trained embedding by TT-SVD (Oseledets, 2011).

        Where the digits count the rows exactly, the error is within ``sqrt(order - 1)`` of the best train of those
        bond ranks. Otherwise the padding row and the rows that only fill up the digits may take any value: the error
        of the others is at most that of the TT-SVD with zeros in those rows. An embedding that is such a train (as
        :meth:`to_dense` returns it) is recovered if the number of values of the first digit whose rows are all used,
        times ``d_1``, is at least the first bond rank. At the largest ranks the result is exact.

        Args:
            embedding: an ``nn.Embedding``.
            rank: one integer, ``order - 1`` integers, or ``ParameterFraction``.
            order: number of cores.
            split: sizes of the digits, in place of ``order``.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.Embedding``, has ``max_norm``, ``scale_grad_by_freq`` or
                ``sparse``, or a padding row that is not zero.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> embedding = nn.Embedding(100, 16, padding_idx=3)
            >>> full = lr.TensorizedEmbedding.from_dense(embedding, rank=1000)
            >>> full.rank, torch.allclose(full(torch.arange(100)), embedding.weight, atol=1e-5)
            ((10, 16), True)
        """
        if type(embedding) is nn.Embedding:
            _refuse(embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse)
        weight = check_dense(cls, embedding)
        assert isinstance(embedding, nn.Embedding)
        if not padding_is_zero(embedding):
            raise UnsupportedLayerError(
                f"TensorizedEmbedding.from_dense: row {embedding.padding_idx}, the padding, is not zero, but this layer"
                " always returns zero there: the cores are shared with rows that learn. Zero that row, or drop"
                " padding_idx."
            )
        digits = _split(embedding.num_embeddings, embedding.embedding_dim, order, split)
        bonds = choose_bonds(rank, digits, weight.numel(), cls.__name__)
        (cores,) = block_trains(weight, digits, [bonds], free_row=embedding.padding_idx)
        return cls.from_cores(embedding, cores)

    @classmethod
    def from_cores(cls, embedding: nn.Module, cores: Sequence[Tensor]) -> TensorizedEmbedding:
        """Builds a layer with the settings of ``embedding`` from cores ``[r_{k-1}, n_k, d_k, r_k]``.

        The cores are rescaled to equal norms. Bond ranks above the largest of use are rounded off first.

        Args:
            embedding: the dense embedding.
            cores: the cores of the tensor train, from first to last.
        """
        split = tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores)
        bonds = tuple(core.shape[3] for core in cores[:-1])
        layer = cls.like(embedding, rank=bonds, split=split)
        if layer.rank != bonds:
            cores = BlockTT(tuple(cores), layer.num_embeddings).truncate(layer.rank).cores
        return fill(layer, [core.transpose(0, 1) for core in balanced_cores(cores)], None)

    def to_dense(self) -> nn.Embedding:
        """The ``nn.Embedding`` that computes the same."""
        first = weight_of(self.parts[0])
        dense: nn.Embedding = nn.utils.skip_init(
            nn.Embedding,
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            norm_type=self.norm_type,
            device=first.device,
            dtype=first.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> BlockTT:
        """The weight as a block tensor train; the padding row is what the cores give, without the mask."""
        return BlockTT(tuple(core.detach() for core in self.cores()), self.num_embeddings)

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return "".join([text, *(f", {key}={value!r}" for key, value in self.form.items())])


def padding_is_zero(embedding: nn.Embedding) -> bool:
    """Returns whether an embedding has no padding row or a zero one, which it is taken to be on the meta device."""
    padding, weight = embedding.padding_idx, embedding.weight
    return padding is None or weight.is_meta or not bool(weight[padding].any())


def _split(rows: int, columns: int, order: int, split: Sequence[Sequence[int]] | None = None) -> Split:
    """The digits that a user's split or order gives."""
    if split is not None:
        return check_split(split, rows, columns, "TensorizedEmbedding")
    return split_digits(rows, columns, order, "TensorizedEmbedding")


def _refuse(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raises for settings that cores cannot have."""
    why = {
        f"max_norm={max_norm}": (
            max_norm is not None,
            "a vector shares its cores with others and cannot be scaled alone",
        ),
        "scale_grad_by_freq=True": (scale_grad_by_freq, "the frequency of a row is not that of its digits"),
        "sparse=True": (sparse, "every batch touches most rows of all cores"),
    }
    for setting, (got, reason) in why.items():
        if got:
            raise UnsupportedLayerError(
                f"TensorizedEmbedding: got {setting}: {reason}; use LowRankEmbedding, or drop the setting."
            )
