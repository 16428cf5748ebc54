"""nn.Conv2d as four thin convolutions (canonical polyadic form)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import cp
from ..factors import CP
from ..rank import Rank, Spectrum, choose_rank
from .base import bias_of, check_dense, fill
from .conv import FactoredConv2d, check_groups


class CPConv2d(FactoredConv2d):
    """1 x 1, k x 1 depthwise, 1 x k depthwise, 1 x 1: a sum of ``rank`` separable kernels (Lebedev et al., 2015).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: size of the kernel.
        stride: stride of the convolution.
        padding: numbers, ``"same"`` or ``"valid"``.
        dilation: spacing between kernel elements.
        groups: must be 1.
        bias: whether a bias is added.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: number of components: an integer (clamped to the largest rank that such a kernel can have) or
            ``ParameterFraction``; there are no singular values for other rules.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, rank, 1, bias=False)``.
        vertical: ``nn.Conv2d(rank, rank, (kh, 1), groups=rank, bias=False)``.
        horizontal: ``nn.Conv2d(rank, rank, (1, kw), groups=rank, bias=False)``.
        expand: ``nn.Conv2d(rank, out_channels, 1, bias=bias)``.

    Raises:
        UnsupportedLayerError: for ``groups`` other than 1.
        LowRankError: if the rank is no integer of at least 1 and no rule.

    Examples:
        >>> layer = lr.CPConv2d(64, 64, 3, padding=1, rank=96)
        >>> layer(torch.randn(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        rank = choose_cp_rank(rank, (self.out_channels, self.in_channels, *self.kernel_size), type(self).__name__)
        self.reduce = nn.Conv2d(self.in_channels, rank, 1, bias=False, **factory)
        self.vertical = nn.Conv2d(rank, rank, groups=rank, bias=False, **self._spatial(0), **factory)
        self.horizontal = nn.Conv2d(rank, rank, groups=rank, bias=False, **self._spatial(1), **factory)
        self.expand = nn.Conv2d(rank, self.out_channels, 1, bias=bias, **factory)

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.reduce.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        out: Tensor = self.expand(self.horizontal(self.vertical(self.reduce(input))))
        return out

    @classmethod
    def from_dense(cls, conv: nn.Module, *, rank: Rank) -> CPConv2d:
        """The CP decomposition of a trained convolution, by alternating least squares.

        Args:
            conv: an ``nn.Conv2d``.
            rank: an integer or ``ParameterFraction``.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Conv2d`` with one group.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> conv = nn.Conv2d(4, 3, 3, padding=1)
            >>> full = lr.CPConv2d.from_dense(conv, rank=27)
            >>> x = torch.randn(2, 4, 5, 5)
            >>> torch.allclose(full(x), conv(x), atol=1e-4)
            True
        """
        weight = check_dense(cls, conv)
        check_groups(cls, conv)
        return cls.from_cp(conv, cp(weight, choose_cp_rank(rank, tuple(weight.shape), cls.__name__)))

    @classmethod
    def from_cp(cls, conv: nn.Module, factors: CP) -> CPConv2d:
        """The layer with the settings of ``conv`` and the given components of its kernel."""
        expand, reduce, vertical, horizontal = factors.balanced()
        layer = cls.like(conv, rank=factors.rank)
        weights = [reduce.mT, vertical.mT, horizontal.mT, expand]
        return fill(layer, weights, bias_of(conv))

    def weight_from_children(self) -> Tensor:
        """The dense kernel ``[out, in, kh, kw]``."""
        expand, reduce, vertical, horizontal = self._matrices()
        return torch.einsum("or,ir,hr,wr->oihw", expand, reduce, vertical, horizontal)

    def factors(self) -> CP:
        """The kernel ``[out, in, kh, kw]`` as a CP value with unit columns."""
        matrices = [matrix.detach() for matrix in self._matrices()]
        norms = [torch.linalg.vector_norm(matrix, dim=0) for matrix in matrices]
        units = [matrix / norm.clamp_min(1e-30) for matrix, norm in zip(matrices, norms, strict=True)]
        weights = torch.stack(norms).prod(0)
        order = weights.argsort(descending=True)
        return CP(weights[order], tuple(unit[:, order] for unit in units))

    def _matrices(self) -> list[Tensor]:
        """Out, in, vertical, horizontal factors, ``[n, rank]`` each."""
        thin = [self.reduce, self.vertical, self.horizontal]
        return [self.expand.weight.flatten(1), *(child.weight.flatten(1).mT for child in thin)]


def cp_limit(shape: tuple[int, ...]) -> int:
    """No tensor of this shape needs more components: the product of all modes but the largest."""
    return math.prod(shape) // max(shape)


def choose_cp_rank(rank: Any, shape: tuple[int, ...], owner: str) -> int:
    """The number of components that ``rank`` means for a kernel."""
    limit = cp_limit(shape)
    sizes = range(sum(shape), sum(shape) * limit + 1, sum(shape))
    return choose_rank(rank, Spectrum(None, (shape[0], shape[1]), sizes, math.prod(shape), owner), limit)
