"""nn.Conv2d in Tucker-2 form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import tucker
from ..decompose.tucker import tucker_spectrum
from ..errors import LowRankError
from ..factors import Tucker
from ..linalg import mode_product
from ..rank import ParameterFraction, RankRule, Spectrum, check_rank, choose_rank
from .base import bias_of, check_dense, fill
from .conv import FactoredConv2d, check_groups

TuckerRank = int | RankRule | Sequence[int | RankRule]


class TuckerConv2d(FactoredConv2d):
    """A 1 x 1 convolution to fewer channels, a small core convolution, and a 1 x 1 back (Tucker-2; Kim et al., 2016).

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
        rank: ``(rank_out, rank_in)``, one integer for both, or a rule; integers are clamped to the dimensions.

    Shape:
        ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``, as in ``nn.Conv2d``.

    Attributes:
        reduce: ``nn.Conv2d(in_channels, rank_in, 1, bias=False)``.
        core: ``nn.Conv2d(rank_in, rank_out, kernel_size, ..., bias=False)``.
        expand: ``nn.Conv2d(rank_out, out_channels, 1, bias=bias)``.

    Raises:
        UnsupportedLayerError: for ``groups`` other than 1.
        LowRankError: if a rank is no integer of at least 1 and no rule.

    Examples:
        >>> layer = lr.TuckerConv2d(256, 256, 3, stride=2, padding=1, rank=(64, 64))
        >>> layer(torch.randn(1, 256, 14, 14)).shape
        torch.Size([1, 256, 7, 7])
    """

    def _build(self, rank: Any, bias: bool, factory: dict[str, Any]) -> None:
        rank_out, rank_in = choose_tucker_rank(
            rank, (self.out_channels, self.in_channels, *self.kernel_size), None, type(self).__name__
        )
        self.reduce = nn.Conv2d(self.in_channels, rank_in, 1, bias=False, **factory)
        self.core = nn.Conv2d(
            rank_in,
            rank_out,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=False,
            padding_mode=self.padding_mode,
            **factory,
        )
        self.expand = nn.Conv2d(rank_out, self.out_channels, 1, bias=bias, **factory)

    @property
    def rank(self) -> tuple[int, int]:
        """``(rank_out, rank_in)``."""
        return self.core.out_channels, self.core.in_channels

    def forward(self, input: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``."""
        out: Tensor = self.expand(self.core(self.reduce(input)))
        return out

    @classmethod
    def from_dense(cls, conv: nn.Module, *, rank: TuckerRank) -> TuckerConv2d:
        """The Tucker-2 decomposition of a trained convolution, by HOOI; the kernel's own modes stay whole.

        Args:
            conv: an ``nn.Conv2d``.
            rank: ``(rank_out, rank_in)``, one integer for both, or a rule. A rule on singular values looks at
                the unfolding of each mode; ``ParameterFraction`` shrinks both ranks in proportion.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Conv2d`` with one group.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> conv = nn.Conv2d(16, 8, 3, stride=(2, 1))
            >>> full = lr.TuckerConv2d.from_dense(conv, rank=(8, 16))
            >>> x = torch.randn(2, 16, 9, 9)
            >>> torch.allclose(full(x), conv(x), atol=1e-5)
            True
        """
        weight = check_dense(cls, conv)
        check_groups(cls, conv)
        ranks = choose_tucker_rank(rank, tuple(weight.shape), weight, cls.__name__)
        return cls.from_tucker(conv, tucker(weight, (*ranks, None, None)))

    @classmethod
    def from_tucker(cls, conv: nn.Module, factors: Tucker) -> TuckerConv2d:
        """The layer with the settings of ``conv`` and the given factors of its kernel."""
        expand, reduce = factors.factors[0], factors.factors[1]
        assert expand is not None
        assert reduce is not None
        layer = cls.like(conv, rank=(expand.shape[1], reduce.shape[1]))
        return fill(layer, [reduce.mT, factors.core, expand], bias_of(conv))

    def weight_from_children(self) -> Tensor:
        """The dense kernel ``[out, in, kh, kw]``."""
        core = mode_product(self.core.weight, self.expand.weight.flatten(1), 0)
        return mode_product(core, self.reduce.weight.flatten(1).mT, 1)

    def factors(self) -> Tucker:
        """The kernel ``[out, in, kh, kw]`` as a Tucker value with orthonormal factors."""
        dtype = self.core.weight.dtype
        expand = torch.linalg.qr(self.expand.weight.detach().double().flatten(1))
        reduce = torch.linalg.qr(self.reduce.weight.detach().double().flatten(1).mT)
        core = mode_product(mode_product(self.core.weight.detach().double(), expand.R, 0), reduce.R, 1)
        return Tucker(core.to(dtype), (expand.Q.to(dtype), reduce.Q.to(dtype), None, None))


def tucker_limits(shape: Sequence[int]) -> tuple[int, int]:
    """The largest ranks that the two channel modes of a kernel ``[out, in, kh, kw]`` can have."""
    out, in_, area = shape[0], shape[1], math.prod(shape[2:])
    return min(out, in_ * area), min(in_, out * area)


def choose_tucker_rank(rank: Any, shape: tuple[int, ...], weight: Tensor | None, owner: str) -> tuple[int, int]:
    """``(rank_out, rank_in)`` that ``rank`` means for a kernel."""
    both = tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank, rank)
    if len(both) != 2:
        raise LowRankError(f"{owner}: got rank {rank!r}, expected (rank_out, rank_in), one integer or one rule.")
    for each in both:
        check_rank(each, owner)
    path = _proportional_path(shape)
    dense = math.prod(shape)
    limits = tucker_limits(shape)
    chosen = []
    for mode, (each, limit) in enumerate(zip(both, limits, strict=True)):
        if isinstance(each, ParameterFraction):
            sizes = [size for _, size in path]
            chosen.append(path[each(Spectrum(None, (shape[0], shape[1]), sizes, dense, owner)) - 1][0][mode])
            continue
        values = tucker_spectrum(weight, mode) if weight is not None and not isinstance(each, int) else None
        columns = dense // shape[mode]
        chosen.append(choose_rank(each, Spectrum(values, (shape[mode], columns), (), dense, owner), limit))
    return chosen[0], chosen[1]


def _proportional_path(shape: tuple[int, ...]) -> list[tuple[tuple[int, int], int]]:
    """Rank pairs in proportion to the channels, from small to large, with the parameters each one takes."""
    out, in_, area = shape[0], shape[1], math.prod(shape[2:])
    top = tucker_limits(shape)
    steps = max(top)
    pairs = [tuple(max(1, round(limit * step / steps)) for limit in top) for step in range(1, steps + 1)]
    return [((a, b), a * out + b * in_ + a * b * area) for a, b in pairs]
