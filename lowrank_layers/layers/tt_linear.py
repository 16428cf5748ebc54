"""Linear layers whose weight is a block tensor train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decompose.block_tt import balanced_cores, block_trains
from ..decompose.bonds import BondRank, choose_bonds
from ..decompose.digits import Split, check_split, split_exactly
from ..factors import BlockTT
from ..linalg import full_precision, train_product
from .base import FactoredModule
from .conversion import adopt, adopt_dense, fill
from .initialization import reset_chain
from .instance_checks import check_dense
from .weights import bias_of, weight_of


class TensorizedLinear(FactoredModule):
    r"""A linear layer whose weight is a block tensor train: a few small cores in place of one large matrix.

    Output and input indices are written in mixed radix, :math:`i = (i_1, \dots, i_K)` and :math:`j = (j_1, \dots,
    j_K)`, and an entry of the weight is the product of small matrices :math:`G_1[i_1, j_1] \cdots G_K[i_K, j_K]`
    (Novikov et al., 2015). With two cores the weight is a sum of ``rank`` Kronecker products. Unlike a pair of factors,
    such a layer can have full matrix rank with very few parameters; it is far from a trained dense layer before it is
    trained itself.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: bond ranks: one integer for all bonds, ``order - 1`` integers, or ``ParameterFraction``. Integers are
            clamped to the largest that is of use.
        order: number of cores. Each side is split into factors that are as equal as possible; a prime side has digits
            of size 1 but for one.
        split: sizes of the digits, ``((out_1, ..., out_K), (in_1, ..., in_K))``, in place of ``order``.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Attributes:
        core0, core1, ...: ``nn.Linear(r_{k-1} * in_k, out_k * r_k, bias=False)``, the slowest digit first. The last one
            holds the bias of the whole layer, ``[out_features]``, which is added to the finished output.

    Raises:
        LowRankError: for bad ranks, orders and splits.

    Examples:
        >>> layer = lr.TensorizedLinear(1024, 4096, rank=8)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
        >>> layer.split, sum(p.numel() for p in layer.parameters())
        (((64, 64), (32, 32)), 36864)
    """

    dense_type = nn.Linear
    fuses_batch_norm = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: BondRank,
        order: int = 2,
        split: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.split = _split(out_features, in_features, order, split)
        bonds = choose_bonds(rank, self.split, out_features * in_features, type(self).__name__)
        self._bonds = (1, *bonds, 1)
        for k, (n, d) in enumerate(zip(*self.split, strict=True)):
            sizes = self._bonds[k] * d, n * self._bonds[k + 1]
            self.add_module(f"core{k}", nn.Linear(*sizes, bias=False, device=device, dtype=dtype))
        if bias:
            self.last.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def rank(self) -> tuple[int, ...]:
        """The bond ranks between the cores."""
        return self._bonds[1:-1]

    @property
    def form(self) -> dict[str, Any]:
        """The order or the split, unless it is the default."""
        order = len(self.split[0])
        if self.split != _split(self.out_features, self.in_features, order):
            return {"split": [list(side) for side in self.split]}
        return {} if order == 2 else {"order": order}

    def cores(self) -> list[Tensor]:
        """Returns the cores ``[r_{k-1}, out_k, in_k, r_k]``, differentiable."""
        return [
            weight_of(child).unflatten(0, (n, -1)).unflatten(2, (-1, d)).permute(2, 0, 3, 1)
            for child, n, d in zip(self.parts, *self.split, strict=True)
        ]

    def product(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, multiplied out, differentiable."""
        return train_product(self.cores())

    def reset_parameters(self) -> None:
        """Draws new weights such that outputs have the variance that those of a new ``nn.Linear`` have."""
        reset_chain(self, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[*, in_features]`` to ``[*, out_features]``."""
        outputs, inputs = self.split
        state = input.unsqueeze(-2)  # [*, output digits so far, bond * input digits to come]
        for k, child in enumerate(self.parts):
            state = state.unflatten(-1, (self._bonds[k] * inputs[k], -1)).mT
            state = child(state) if bias_of(child) is None else F.linear(state, weight_of(child))
            state = state.unflatten(-1, (outputs[k], -1)).movedim(-3, -1).flatten(-2).flatten(-3, -2)
        out = state.flatten(-2)
        bias = self.bias
        return out if bias is None else out + bias.to(out.dtype)

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates per sample of the cores at all positions but the first."""
        outputs, inputs = self.split
        positions = (math.prod(outputs[:k]) * math.prod(inputs[k + 1 :]) for k in range(len(outputs)))
        sizes = (weight_of(child).numel() for child in self.parts)
        return math.prod(input_shape[:-1]) * sum(n * (p - 1) for n, p in zip(sizes, positions, strict=True))

    @classmethod
    def like(
        cls,
        dense: nn.Module,
        *,
        rank: Any,
        bias: bool | None = None,
        order: int = 2,
        split: Sequence[Sequence[int]] | None = None,
    ) -> TensorizedLinear:
        """A layer with the settings, device and dtype of ``dense``, uninitialized."""
        assert isinstance(dense, nn.Linear)
        with_bias = dense.bias is not None if bias is None else bias
        sizes, weight = (dense.in_features, dense.out_features), dense.weight
        layer = cls(*sizes, with_bias, "meta", weight.dtype, rank=rank, order=order, split=split)
        return adopt(layer.to_empty(device=weight.device), dense)

    @classmethod
    @full_precision
    def from_dense(
        cls, linear: nn.Module, *, rank: BondRank, order: int = 2, split: Sequence[Sequence[int]] | None = None
    ) -> TensorizedLinear:
        """Decomposes a trained layer by TT-SVD (Oseledets, 2011).

        The error is within ``sqrt(order - 1)`` of that of the best train of those bond ranks, so that two cores are the
        best ones. At the largest ranks the result is exact.

        Args:
            linear: an ``nn.Linear``.
            rank: one integer, ``order - 1`` integers, or ``ParameterFraction``.
            order: number of cores.
            split: sizes of the digits, in place of ``order``.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.Linear``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> linear = nn.Linear(64, 30)
            >>> full = lr.TensorizedLinear.from_dense(linear, rank=1000)
            >>> x = torch.randn(5, 64)
            >>> full.rank, torch.allclose(full(x), linear(x), atol=1e-5)
            ((40,), True)
        """
        weight = check_dense(cls, linear)
        digits = _split(weight.shape[0], weight.shape[1], order, split)
        bonds = choose_bonds(rank, digits, weight.numel(), cls.__name__)
        (cores,) = block_trains(weight, digits, [bonds])
        return cls.from_cores(linear, cores, bias_of(linear))

    @classmethod
    def from_cores(cls, linear: nn.Module, cores: Sequence[Tensor], bias: Tensor | None) -> TensorizedLinear:
        """Builds a layer with the settings of ``linear`` from cores ``[r_{k-1}, out_k, in_k, r_k]``.

        The cores are rescaled to equal norms. Bond ranks above the largest of use are rounded off first.

        Args:
            linear: the dense layer.
            cores: the cores of the tensor train, from first to last.
            bias: the bias; without one the layer has none.
        """
        split = tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores)
        bonds = tuple(core.shape[3] for core in cores[:-1])
        layer = cls.like(linear, rank=bonds, bias=bias is not None, split=split)
        if layer.rank != bonds:
            cores = BlockTT(tuple(cores), layer.out_features).truncate(layer.rank).cores
        return fill(layer, [core.permute(1, 3, 0, 2) for core in balanced_cores(cores)], bias)

    def to_dense(self) -> nn.Linear:
        """Multiplies the cores out into the ``nn.Linear`` that computes the same."""
        first, bias = weight_of(self.parts[0]), self.bias
        settings = {"bias": bias is not None, "device": first.device, "dtype": first.dtype}
        dense: nn.Linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, **settings)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if bias is not None:
                dense.bias.copy_(bias)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> BlockTT:
        """The weight ``[out_features, in_features]`` as a block tensor train."""
        return BlockTT(tuple(core.detach() for core in self.cores()), self.out_features)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return "".join([text, f", rank={self.rank}", *(f", {key}={value!r}" for key, value in self.form.items())])


def _split(rows: int, columns: int, order: int, split: Sequence[Sequence[int]] | None = None) -> Split:
    """The digits that a user's split or order gives."""
    if split is not None:
        return check_split(split, rows, columns, "TensorizedLinear", exact=True)
    return split_exactly(rows, columns, order, "TensorizedLinear")
