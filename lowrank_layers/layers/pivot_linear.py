"""Linear layers of low rank in pivot form."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..decompose.pair import pair_factors, truncated_pair
from ..decompose.pivot import pivot_columns
from ..errors import LowRankError
from ..factors import SVD
from ..rank import Rank
from .conversion import fill
from .initialization import allowing_empty
from .instance_checks import check_dense
from .linear import LowRankLinear
from .weights import bias_of


class PivotLinear(LowRankLinear):
    r"""A linear layer of rank at most ``rank`` in pivot form: :math:`y = U (x_p + C x_o) + b`.

    A matrix of rank ``r`` has ``r`` columns from which the others follow: :math:`W = U \, [I, C]` up to the order of
    the columns, where :math:`U` are the columns of the pivot inputs :math:`x_p`, and :math:`C` gives those of the other
    inputs :math:`x_o`. That takes ``r * (in_features + out_features - r)`` numbers, ``r * r`` fewer than
    :class:`LowRankLinear` for the same map, and never more than the dense layer (Zhao et al., 2025, PIFA, there with
    rows in place of columns).

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: as in :class:`LowRankLinear`.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Attributes:
        down: an ``nn.Linear`` without bias from the ``in_features - rank`` other inputs: the coefficients :math:`C`.
        up: ``nn.Linear(rank, out_features, bias)``.
        order: the buffer ``[in_features]`` with the indices of the inputs: the pivots, then the others.

    Raises:
        LowRankError: if the rank is neither an integer of at least 1 nor a rule.

    Examples:
        >>> pair, pivot = lr.LowRankLinear(1024, 1024, rank=512), lr.PivotLinear(1024, 1024, rank=512)
        >>> [sum(p.numel() for p in layer.parameters()) for layer in (nn.Linear(1024, 1024), pair, pivot)]
        [1049600, 1049600, 787456]
        >>> pivot(torch.randn(8, 1024)).shape
        torch.Size([8, 1024])
    """

    dense_type = nn.Linear
    _pivot = True
    pair_type: ClassVar[type[LowRankLinear]] = LowRankLinear
    """The layer of the same map as a pair."""

    order: Tensor

    def _build(self, rank: int, bias: bool, factory: dict[str, Any]) -> None:
        with allowing_empty():
            self.down = nn.Linear(self.in_features - rank, rank, bias=False, **factory)
        self.up = nn.Linear(rank, self.out_features, bias=bias, **factory)
        self.register_buffer("order", torch.arange(self.in_features, device=factory["device"]))

    @property
    def basis(self) -> Tensor:
        """The matrix ``[rank, in_features]`` between the inputs and ``up``: ``[I, C]`` with its columns in place."""
        return pivot_basis(self.down.weight, self.order)

    def product(self) -> Tensor:
        """Multiplies out the dense weight ``[out_features, in_features]``, differentiably."""
        return self.up.weight @ self.basis

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights such that outputs have the variance that those of a new ``nn.Linear`` have."""
        bound = 1 / math.sqrt(max(1, self.in_features))
        nn.init.uniform_(self.down.weight, -math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        nn.init.uniform_(self.up.weight, -bound, bound)
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[*, in_features]`` to ``[*, out_features]``."""
        ordered = input.index_select(-1, self.order)
        pivots, others = ordered.split([self.rank, self.in_features - self.rank], -1)
        out: Tensor = self.up(pivots + self.down(others))
        return out

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> PivotLinear:
        """Builds a layer with the settings, device and dtype of ``dense``, uninitialized but for the order."""
        layer = super().like(dense, rank=rank, bias=bias)
        assert isinstance(layer, PivotLinear)
        torch.arange(layer.in_features, out=layer.order)
        return layer

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> PivotLinear:
        """Factorizes a trained layer by its truncated SVD, in pivot form.

        Args:
            linear: an ``nn.Linear``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.Linear``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> linear = nn.Linear(64, 32)
            >>> pair, pivot = (cls.from_dense(linear, rank=8) for cls in (lr.LowRankLinear, lr.PivotLinear))
            >>> x = torch.randn(5, 64)
            >>> torch.allclose(pivot(x), pair(x), atol=1e-5)
            True
        """
        weight = check_dense(cls, linear)
        return cls.from_pair(linear, *truncated_pair(weight.double(), rank, cls.__name__, pivot=True), bias_of(linear))

    @classmethod
    def from_pair(cls, linear: nn.Module, up: Tensor, down: Tensor, bias: Tensor | None) -> PivotLinear:
        """Builds the layer with the settings of ``linear`` that computes ``up @ down``, such as those of a pair.

        Args:
            linear: the dense layer.
            up: the factor ``[out_features, r]``.
            down: the factor ``[r, in_features]``.
            bias: the bias; without one the layer has none.

        Raises:
            LowRankError: for factors that are not of these shapes, or of a rank above both sizes.
        """
        layer = cls.like(linear, rank=max(1, len(down)), bias=bias is not None)
        shapes = (layer.out_features, layer.rank), (layer.rank, layer.in_features)
        if (tuple(up.shape), tuple(down.shape)) != shapes:
            raise LowRankError(
                f"{cls.__name__}.from_pair: got factors {list(up.shape)} and {list(down.shape)}, expected"
                f" {[layer.out_features, 'r']} and {['r', layer.in_features]} with r at most {layer._limit}."
            )
        columns, coefficients, order = pivot_columns(up.detach(), down.detach())
        layer.order.copy_(order)
        return fill(layer, [coefficients, columns], bias)

    def to_pair(self) -> LowRankLinear:
        """Returns the ordinary pair of factors that computes the same.

        Examples:
            >>> pivot = lr.PivotLinear(64, 32, rank=8)
            >>> x = torch.randn(5, 64)
            >>> torch.allclose(pivot.to_pair()(x), pivot(x), atol=1e-5)
            True
        """
        layer = self.pair_type.like(self.to_dense(), rank=self.rank)
        return fill(layer, [self.basis, self.up.weight], self.up.bias)

    @classmethod
    def of_pair(cls, pair: LowRankLinear) -> PivotLinear:
        """Returns the pivot form of a pair.

        Args:
            pair: the layer; it stays as it is.

        Examples:
            >>> pair = lr.LowRankLinear(64, 32, rank=8)
            >>> x = torch.randn(5, 64)
            >>> torch.allclose(lr.PivotLinear.of_pair(pair)(x), pair(x), atol=1e-5)
            True
        """
        return cls.from_pair(pair.to_dense(), pair.up.weight, pair.down.weight, pair.up.bias)

    def factors(self) -> SVD:
        """The weight ``[out_features, in_features]`` as an SVD."""
        return pair_factors(self.up.weight, self.basis)


def pivot_basis(coefficients: Tensor, order: Tensor) -> Tensor:
    """Returns ``[I, C]`` with its columns in the order of the inputs, ``[rank, in_features]``.

    Args:
        coefficients: the matrix ``C``, ``[rank, in_features - rank]``.
        order: the indices of the inputs: the pivots, then the others.
    """
    identity = torch.eye(coefficients.shape[0], dtype=coefficients.dtype, device=coefficients.device)
    return torch.cat([identity, coefficients], 1).index_select(1, order.argsort())
