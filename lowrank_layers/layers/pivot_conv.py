"""Convolutions of low rank whose pointwise end is in pivot form."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..decompose.pair import grouped_pairs
from ..linalg import full_precision, pivot_rows
from ..rank import Rank, choose_rank, pair_spectrum
from .conversion import fill
from .cost import conv_output_size
from .initialization import allowing_empty
from .instance_checks import check_dense
from .kernel import ConvNd, kernel_of, linear_axes, matrix_of
from .low_rank_conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .pair_conv import PairConv
from .weights import bias_of, weight_of

Pivot = TypeVar("Pivot", bound="PivotConv")


class PivotConv(PairConv):
    r"""A convolution to ``rank`` channels and a pointwise one, :math:`[I; C]` with its rows in some order.

    The first convolution computes some of the outputs, the pivots, and the others follow from these. The matrix
    :math:`[I; C]` is put together in each forward, so that the layer takes the time of the pair: on feature maps,
    putting outputs in order would take longer than the products that it saves.
    """

    fuses_batch_norm = False
    pair_type: ClassVar[type[PairConv]]
    """The layer of the same map as a pair."""

    position: Tensor
    up: ConvNd

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        self.first_axes = self._first_axes()
        rows, columns = self._matrix_shape()
        spectrum = pair_spectrum(rows, columns, None, type(self).__name__, pivot=True)
        inner = self.groups * choose_rank(rank, spectrum, min(rows, columns))
        self.down = self._spatial(self.in_channels, inner, axes=self.first_axes, **factory)
        with allowing_empty():
            self.up = self._pointwise(inner, self.out_channels - inner, **factory)  # type: ignore[assignment]
        if bias:
            self.up.bias = nn.Parameter(torch.empty(self.out_channels, **factory))
        self.register_buffer("position", torch.arange(self.out_channels, device=factory["device"]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights such that outputs have the variance that those of a new dense layer have."""
        bound = 1 / math.sqrt(max(1, math.prod(self.kernel_shape[1:])))
        nn.init.uniform_(weight_of(self.down), -bound, bound)
        nn.init.uniform_(self.up.weight, -math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        if self.up.bias is not None:
            nn.init.uniform_(self.up.bias, -bound, bound)

    def expansion(self) -> Tensor:
        """The weight ``[out_channels, rank, 1, ...]`` of the pointwise convolution: ``[I; C]`` in order."""
        weight = self.up.weight
        identity = torch.eye(self.rank, dtype=weight.dtype, device=weight.device).repeat(self.groups, 1)
        return torch.cat([identity.view(-1, *weight.shape[1:]), weight]).index_select(0, self.position)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as the dense layer does."""
        out: Tensor = self.up._conv_forward(self.down(input), self.expansion(), self.up.bias)
        return out

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates per sample with the rows of the identity."""
        return self.rank * self.own_writes(input_shape)

    def own_writes(self, input_shape: tuple[int, ...]) -> int:
        """Outputs per sample that are pivots: ``up`` computes them once more, in their places."""
        assert isinstance(self.down, ConvNd)
        return self.groups * self.rank * math.prod(conv_output_size(self.down, input_shape[1:]))

    def _pairs(self) -> tuple[Tensor, Tensor]:
        return self.expansion().flatten(1).unflatten(0, (self.groups, -1)), kernel_of(self.down).flatten(2)

    @classmethod
    def like(cls: type[Pivot], dense: nn.Module, *, rank: Any, bias: bool | None = None, **form: Any) -> Pivot:
        """Builds a layer with the settings, device and dtype of ``dense``, uninitialized but for the order."""
        layer = super().like(dense, rank=rank, bias=bias, **form)
        torch.arange(layer.out_channels, out=layer.position)
        return layer

    @classmethod
    def from_dense(cls: type[Pivot], conv: nn.Module, *, rank: Rank, **form: Any) -> Pivot:
        """Factorizes a trained convolution as :meth:`PairConv.from_dense` does, and takes the pivot form of the pair.

        Args:
            conv: the dense convolution.
            rank: an integer or a rank rule, which gets the root mean square of the groups' singular values.
            **form: none.

        Raises:
            UnsupportedLayerError: if it is not the plain torch layer that this class replaces.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        check_dense(cls, conv)
        matrix = matrix_of(kernel_of(conv).detach().double(), linear_axes(conv))
        return cls.from_pairs(conv, *grouped_pairs(matrix, rank, cls.__name__, pivot=True), bias_of(conv), **form)

    @classmethod
    @full_precision
    def from_pairs(
        cls: type[Pivot], conv: nn.Module, lasts: Tensor, firsts: Tensor, bias: Tensor | None, **form: Any
    ) -> Pivot:
        """Builds a layer like ``conv`` that computes the pairs ``[groups, rows, r]`` and ``[groups, r, columns]``."""
        groups, rows, rank = lasts.shape
        layer = cls.like(conv, rank=rank, bias=bias is not None, **form)
        orders, coefficients = zip(*map(pivot_rows, lasts.detach()), strict=True)
        pivots = [last[order[:rank]] for last, order in zip(lasts.detach().double(), orders, strict=True)]
        channels = torch.stack(orders) + rows * torch.arange(groups, device=lasts.device)[:, None]
        order = torch.cat([channels[:, :rank].flatten(), channels[:, rank:].flatten()])
        layer.position.copy_(order.argsort())
        return fill(layer, [torch.stack(pivots) @ firsts.detach().double(), torch.cat(coefficients)], bias)

    def to_pair(self) -> PairConv:
        """Returns the ordinary pair that computes the same."""
        lasts, firsts = self._pairs()
        return self.pair_type.from_pairs(self.to_dense(), lasts.detach(), firsts.detach(), bias_of(self.up))

    @classmethod
    def of_pair(cls: type[Pivot], pair: PairConv) -> Pivot:
        """Returns the pivot form of a pair.

        Args:
            pair: the layer; it stays as it is.
        """
        return cls.from_pairs(pair.to_dense(), *pair._pairs(), pair.bias)


class PivotConv1d(PivotConv):
    """:class:`LowRankConv1d` in pivot form: the same map in ``groups * rank * rank`` fewer numbers.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv1d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, L]`` or ``[in_channels, L]``, as in ``nn.Conv1d``.

    Attributes:
        down: ``nn.Conv1d(in_channels, groups*rank, kernel_size, ..., bias=False)``, which computes the pivots.
        up: an ``nn.Conv1d`` with the coefficients of the other outputs, and the bias of all.
        position: the buffer ``[out_channels]``: where each output stands among the pivots, then the others.

    Examples:
        >>> lr.PivotConv1d(16, 32, 5, padding=2, rank=8)(torch.randn(1, 16, 20)).shape
        torch.Size([1, 32, 20])
    """

    dense_type = nn.Conv1d
    pair_type = LowRankConv1d


class PivotConv2d(PivotConv):
    """:class:`LowRankConv2d` in pivot form: the same map in ``groups * rank * rank`` fewer numbers, and as many MACs.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the convolution kernel.
        stride: stride of the convolution.
        padding: padding of the input: numbers, ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: number of groups; each is factorized on its own, at the same rank.
        bias: whether the layer has a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner channels per group: an integer (clamped to the sides of the matrix) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        down: ``nn.Conv2d(in_channels, groups*rank, kernel_size, ..., bias=False)``, which computes the pivots.
        up: an ``nn.Conv2d`` with the coefficients of the other outputs, and the bias of all.
        position: the buffer ``[out_channels]``: where each output stands among the pivots, then the others.

    Raises:
        LowRankError: if the rank is neither an integer of at least 1 nor a rule.

    Examples:
        >>> pair, pivot = (cls(256, 256, 1, rank=128, bias=False) for cls in (lr.LowRankConv2d, lr.PivotConv2d))
        >>> [sum(p.numel() for p in layer.parameters()) for layer in (pair, pivot)]
        [65536, 49152]
        >>> conv = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        >>> pair, pivot = (cls.from_dense(conv, rank=4) for cls in (lr.LowRankConv2d, lr.PivotConv2d))
        >>> x = torch.randn(2, 8, 9, 9)
        >>> torch.allclose(pivot(x), pair(x), atol=1e-5)
        True
    """

    dense_type = nn.Conv2d
    pair_type = LowRankConv2d


class PivotConv3d(PivotConv):
    """:class:`LowRankConv3d` in pivot form: the same map in ``groups * rank * rank`` fewer numbers.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, \
dtype: as in ``nn.Conv3d``.
        rank: inner channels per group: an integer (clamped) or a rule that needs no weights.

    Shape:
        ``[N, in_channels, D, H, W]`` or ``[in_channels, D, H, W]``, as in ``nn.Conv3d``.

    Attributes:
        down: ``nn.Conv3d(in_channels, groups*rank, kernel_size, ..., bias=False)``, which computes the pivots.
        up: an ``nn.Conv3d`` with the coefficients of the other outputs, and the bias of all.
        position: the buffer ``[out_channels]``: where each output stands among the pivots, then the others.

    Examples:
        >>> lr.PivotConv3d(8, 16, 3, padding=1, rank=4)(torch.randn(1, 8, 4, 6, 6)).shape
        torch.Size([1, 16, 4, 6, 6])
    """

    dense_type = nn.Conv3d
    pair_type = LowRankConv3d
