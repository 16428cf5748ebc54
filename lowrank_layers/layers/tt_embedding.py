"""Embeddings as a block tensor train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose.partial_train import trains_of_known
from ..decompose.tensor_train import tensor_trains
from ..errors import LowRankError, UnsupportedLayerError
from ..factors import BlockTT
from ..linalg import full_precision, scaled_to_unit, train_product, working_dtype
from ..rank import ParameterFraction, Spectrum, check_rank, choose_rank
from .base import FactoredModule, adopt, adopt_dense, fill, weight_of
from .plain import check_dense

Split = tuple[tuple[int, ...], tuple[int, ...]]
"""How rows and columns become digits: ``(n_1, ..., n_K), (d_1, ..., d_K)``."""
BondRank = int | ParameterFraction | Sequence[int]


class TensorizedEmbedding(FactoredModule):
    r"""Looks up a row digit by digit: a table in block tensor-train form.

    The row's index is written in mixed radix, :math:`i = (i_1, \dots, i_K)`, and so is the column's; an entry is the
    product of small matrices :math:`G_1[i_1, j_1] \cdots G_K[i_K, j_K]` (Novikov et al., 2015; Khrulkov et al., 2020).
    Unlike a pair, such a table can have full matrix rank in very few parameters; unlike a pair, it needs structure
    along the digits, which a vocabulary in no particular order may not have. Rows are filled up to
    :math:`n_1 \cdots n_K \ge n`, the smallest such product of nearly equal factors; columns are split exactly, so a
    prime dimension has digits of size 1 but for one.

    Args:
        num_embeddings: size of the dictionary.
        embedding_dim: size of each embedding vector.
        padding_idx: this vector is always zero and gets no gradient.
        max_norm: only ``None``: a vector is a product of cores that it shares with others, so it cannot be
            renormalized alone.
        norm_type: the p of that norm, kept for ``to_dense``.
        scale_grad_by_freq: only ``False``: the frequency of a row is not that of its digits.
        sparse: only ``False``: every lookup touches rows of all cores, most of them in every batch.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: the inner bonds: an integer for all of them or a tuple of ``order - 1``, each clamped to the largest that
            is of use, or ``ParameterFraction``.
        order: number of cores.
        split: instead of an order: the digits, ``((n_1, ..., n_K), (d_1, ..., d_K))``.

    Shape:
        ``[*]`` of integers to ``[*, embedding_dim]``.

    Attributes:
        core0, core1, ...: ``nn.Embedding(n_k, r_{k-1} * d_k * r_k)``, the first digit (the slowest) first.

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
        self.split = digits(num_embeddings, embedding_dim, order, split)
        bonds = choose_bonds(rank, self.split, num_embeddings * embedding_dim)
        self._bonds = (1, *bonds, 1)
        for k, (n, d) in enumerate(zip(*self.split, strict=True)):
            width = self._bonds[k] * d * self._bonds[k + 1]
            self.add_module(f"core{k}", nn.Embedding(n, width, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether this is an ``nn.Embedding`` without ``max_norm``, ``scale_grad_by_freq`` and ``sparse``."""
        if type(module) is not nn.Embedding:
            return False
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse

    @property
    def rank(self) -> tuple[int, ...]:
        """The inner bonds."""
        return self._bonds[1:-1]

    @property
    def form(self) -> dict[str, Any]:
        """The order, or the split, where it is not the default."""
        order = len(self.split[0])
        if self.split != digits(self.num_embeddings, self.embedding_dim, order, None):
            return {"split": [list(side) for side in self.split]}
        return {} if order == 3 else {"order": order}

    def cores(self) -> list[Tensor]:
        """The cores ``[r_{k-1}, n_k, d_k, r_k]``, differentiable."""
        return [
            weight_of(child).unflatten(1, (self._bonds[k], d, self._bonds[k + 1])).transpose(0, 1)
            for k, (child, d) in enumerate(zip(self.parts, self.split[1], strict=True))
        ]

    def product(self) -> Tensor:
        """The dense embedding ``[num_embeddings, embedding_dim]``, multiplied out, differentiable."""
        table = train_product(self.cores())[: self.num_embeddings]
        if self.padding_idx is not None:
            rows = torch.arange(self.num_embeddings, device=table.device)
            table = table.masked_fill((rows == self.padding_idx)[:, None], 0)
        return table

    def reset_parameters(self) -> None:
        """Draws new weights; vectors have unit variance, as those of a fresh ``nn.Embedding``."""
        for child, bond in zip(self.parts, self._bonds, strict=False):
            nn.init.uniform_(weight_of(child), -math.sqrt(3 / bond), math.sqrt(3 / bond))

    def forward(self, input: Tensor) -> Tensor:
        """``[*]`` of integers to ``[*, embedding_dim]``."""
        looked = [child(digit) for child, digit in zip(self.parts, self._digits(input), strict=True)]
        out: Tensor = looked[0].unflatten(-1, (self.split[1][0], self._bonds[1]))
        for k in range(1, len(looked)):
            out = out @ looked[k].unflatten(-1, (self._bonds[k], -1))
            out = out.unflatten(-1, (self.split[1][k], self._bonds[k + 1])).flatten(-3, -2)
        out = out.squeeze(-1)
        if self.padding_idx is not None:
            out = out.masked_fill((input == self.padding_idx)[..., None], 0)
        return out

    def _digits(self, index: Tensor) -> list[Tensor]:
        """The index in mixed radix; what is out of range stays so in the first digit, for its core to refuse."""
        sizes = self.split[0]
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        first = index // strides[0]
        if math.prod(sizes) > self.num_embeddings:
            first = torch.where(index < self.num_embeddings, first, sizes[0])
        return [first, *(index // stride % n for stride, n in zip(strides[1:], sizes[1:], strict=True))]

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Of the products of the looked-up cores."""
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
        """The TT-SVD of a trained table (Oseledets, 2011): within ``sqrt(order - 1)`` of the best train of those bonds.

        That holds where the digits count the rows exactly. Otherwise the rows that only fill them up, and the padding
        row, are free: the error of the others is at most that of the TT-SVD with zeros there. An embedding that is such
        a train (what :meth:`to_dense` gave) is found again, where the first digit's values whose rows are all used,
        times ``d_1``, are at least the first bond. At the largest bonds it is exact.

        Args:
            embedding: an ``nn.Embedding``.
            rank: one integer, ``order - 1`` of them, or ``ParameterFraction``.
            order: number of cores.
            split: instead of an order: the digits.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Embedding`` without ``max_norm``,
                ``scale_grad_by_freq`` and ``sparse``, or its padding row is not zero.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> table = nn.Embedding(100, 16, padding_idx=3)
            >>> full = lr.TensorizedEmbedding.from_dense(table, rank=1000)
            >>> full.rank, torch.allclose(full(torch.arange(100)), table.weight, atol=1e-5)
            ((10, 16), True)
        """
        if type(embedding) is nn.Embedding:
            _refuse(embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse)
        table = check_dense(cls, embedding)
        assert isinstance(embedding, nn.Embedding)
        if not padding_is_zero(embedding):
            raise UnsupportedLayerError(
                f"TensorizedEmbedding.from_dense: row {embedding.padding_idx}, the padding, is not zero, but this layer"
                " always returns zero there: the cores are shared with rows that learn. Zero that row, or drop"
                " padding_idx."
            )
        how = digits(embedding.num_embeddings, embedding.embedding_dim, order, split)
        bonds = choose_bonds(rank, how, table.numel())
        (cores,) = block_trains(table, how, [bonds], padding_idx=embedding.padding_idx)
        return cls.from_cores(embedding, cores)

    @classmethod
    def from_cores(cls, embedding: nn.Module, cores: Sequence[Tensor]) -> TensorizedEmbedding:
        """The layer with the settings of ``embedding`` and the given cores ``[r_{k-1}, n_k, d_k, r_k]``.

        Their sizes are evened out: all get the same norm. Bonds above what is of use are rounded off first.
        """
        how = tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores)
        bonds = tuple(core.shape[3] for core in cores[:-1])
        layer = cls.like(embedding, rank=bonds, split=how)
        if layer.rank != bonds:
            cores = BlockTT(tuple(cores), layer.num_embeddings).truncate(layer.rank).cores
        parts = [scaled_to_unit(core.double()) for core in cores]
        norms = [torch.linalg.vector_norm(core) * unit for core, unit in parts]
        even = math.prod((norm ** (1 / len(cores)) for norm in norms), start=torch.ones_like(norms[0]))
        scales = [torch.where(norm > 0, even / norm, 0) for norm in norms]
        scaled = [core.double().transpose(0, 1) * scale for core, scale in zip(cores, scales, strict=True)]
        return fill(layer, scaled, None)

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
        """The table as a block tensor train. What the cores make of the padding row is in it, unmasked."""
        return BlockTT(tuple(core.detach() for core in self.cores()), self.num_embeddings)

    def extra_repr(self) -> str:
        """The settings, as printed."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return "".join([text, *(f", {key}={value!r}" for key, value in self.form.items())])


def padding_is_zero(embedding: nn.Embedding) -> bool:
    """Whether its padding row, if it has one, is zero; on the meta device nobody knows, which counts as yes."""
    padding, weight = embedding.padding_idx, embedding.weight
    return padding is None or weight.is_meta or not bool(weight[padding].any())


def digits(rows: int, columns: int, order: int, split: Sequence[Sequence[int]] | None) -> Split:
    """How a table is split: rows descending, columns ascending, so that the products of a digit's two are alike."""
    if split is not None:
        return _check_split(rows, columns, split)
    if isinstance(order, bool) or not isinstance(order, int) or order < 2:
        raise LowRankError(f"TensorizedEmbedding: got order {order!r}, expected an integer of at least 2.")
    return _split_rows(rows, order), _split_columns(columns, order)


def _check_split(rows: int, columns: int, split: Sequence[Sequence[int]]) -> Split:
    try:
        n, d = (tuple(int(digit) for digit in side) for side in split)
    except (TypeError, ValueError):
        n, d = (), ()
    fits = len(n) == len(d) > 1 and min(*n, *d) > 0 and math.prod(n) >= rows and math.prod(d) == columns
    if not fits:
        raise LowRankError(
            f"TensorizedEmbedding: got split {split!r}, expected two tuples of the same length, of at least 2, whose"
            f" products are at least {rows} (the rows) and exactly {columns} (the columns)."
        )
    return n, d


def _split_rows(rows: int, order: int) -> tuple[int, ...]:
    """The smallest product of ``b`` and ``b + 1``, ``order`` of them, that is not below ``rows``; descending."""
    base = max(1, int(rows ** (1 / order)))
    while (base + 1) ** order <= rows:
        base += 1
    while base > 1 and base**order > rows:
        base -= 1
    more = next(k for k in range(order + 1) if (base + 1) ** k * base ** (order - k) >= rows)
    return (base + 1,) * more + (base,) * (order - more)


def _split_columns(columns: int, order: int) -> tuple[int, ...]:
    """The ``order`` factors of ``columns`` with the least sum; ascending."""
    return min(_factorizations(columns, order, 1), key=sum)


def _factorizations(number: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (number,)
        return
    for factor in range(least, int(number ** (1 / count) + 1e-9) + 1):
        if number % factor == 0:
            for rest in _factorizations(number // factor, count - 1, factor):
                yield factor, *rest


def clamp_bonds(bonds: Sequence[int], split: Split) -> tuple[int, ...]:
    """No bond can do with more than its neighbour times the digit between them, from either end."""
    modes = [n * d for n, d in zip(*split, strict=True)]
    chain = [1, *bonds, 1]
    for k in range(1, len(modes)):
        chain[k] = min(chain[k], chain[k - 1] * modes[k - 1])
    for k in range(len(modes) - 1, 0, -1):
        chain[k] = min(chain[k], chain[k + 1] * modes[k])
    return tuple(chain[1:-1])


def train_size(bonds: Sequence[int], split: Split) -> int:
    """Numbers that a train of these bonds stores."""
    chain = [1, *bonds, 1]
    return sum(chain[k] * n * d * chain[k + 1] for k, (n, d) in enumerate(zip(*split, strict=True)))


def uniform_bonds(split: Split) -> list[tuple[int, ...]]:
    """The bonds that ``rank=1``, ``rank=2``, ... mean, until none grows."""
    count = len(split[0]) - 1
    largest = clamp_bonds((math.prod(n * d for n, d in zip(*split, strict=True)),) * count, split)
    return [clamp_bonds((rank,) * count, split) for rank in range(1, max(largest) + 1)]


def choose_bonds(rank: Any, split: Split, dense: int) -> tuple[int, ...]:
    """The bonds that ``rank`` means for a table of ``dense`` numbers."""
    owner, count = "TensorizedEmbedding", len(split[0]) - 1
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) != count or not all(isinstance(each, int) for each in rank):
            raise LowRankError(
                f"{owner}: got rank {rank!r}, expected one integer, {count} of them (one a bond) or ParameterFraction."
            )
        for each in rank:
            check_rank(each, owner)
        return clamp_bonds(rank, split)
    check_rank(rank, owner)
    if isinstance(rank, int):
        return clamp_bonds((rank,) * count, split)
    ladder = uniform_bonds(split)
    sizes = [train_size(bonds, split) for bonds in ladder]
    shape = math.prod(split[0]), math.prod(split[1])
    return ladder[choose_rank(rank, Spectrum(None, shape, sizes, dense, owner), len(ladder)) - 1]


def block_trains(
    table: Tensor,
    split: Split,
    bonds: Sequence[tuple[int, ...]],
    scales: Sequence[Tensor] | None = None,
    *,
    padding_idx: int | None = None,
) -> Iterator[list[Tensor]]:
    """The train of an embedding for each of several bonds, cores ``[r_{k-1}, n_k, d_k, r_k]``.

    Args:
        table: ``[n, d]``.
        split: its digits.
        bonds: one tuple for each train.
        scales: ``[n_k, d_k]``, positive, for each digit: the error is that of the table times their product, which
            the cores take back.
        padding_idx: a row that may become anything, like those that only fill the digits up.
    """
    tensor = _by_digits(table.to(working_dtype(table)), split)
    for k, scale in enumerate(scales or ()):
        tensor = tensor * scale.to(tensor).flatten().reshape(-1, *[1] * (tensor.ndim - 1 - k))
    known = torch.ones(len(table), 1, dtype=torch.bool, device=table.device)
    if padding_idx is not None:
        known[padding_idx] = False
    if padding_idx is None and len(table) == math.prod(split[0]):
        trains = tensor_trains(tensor, bonds)
    else:
        trains = trains_of_known(tensor, _by_digits(known.expand(table.shape), split), bonds)
    for train in trains:
        cores = [core.unflatten(1, sizes) for core, sizes in zip(train, zip(*split, strict=True), strict=True)]
        if scales is not None:
            cores = [core / scale.to(core)[None, ..., None] for core, scale in zip(cores, scales, strict=True)]
        yield cores


def _by_digits(table: Tensor, split: Split) -> Tensor:
    """As a tensor of one mode a digit, ``[n_1 * d_1, ..., n_K * d_K]``, filled up with zeros."""
    n, d = split
    order = len(n)
    if len(table) < math.prod(n):
        table = torch.cat([table, table.new_zeros(math.prod(n) - len(table), table.shape[1])])
    table = table.reshape(*n, *d).permute([axis for k in range(order) for axis in (k, order + k)])
    return table.reshape([a * b for a, b in zip(n, d, strict=True)])


def _refuse(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
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
