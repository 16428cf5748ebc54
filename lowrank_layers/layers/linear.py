"""Linear layers of low rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..decompose.pair import pair_factors, truncated_pair
from ..factors import SVD
from ..rank import Rank, choose_rank, pair_spectrum
from .base import FactoredModule
from .conversion import adopt, adopt_dense, fill
from .initialization import reset_chain
from .instance_checks import check_dense
from .weights import bias_of


class LowRankLinear(FactoredModule):
    r"""A linear layer of rank at most ``rank``, :math:`y = U (V x) + b`: two thin linear layers in a row.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner dimension: an integer (clamped to ``min(in_features, out_features)``) or a rule that needs no
            weights, such as ``ParameterFraction(0.3)``.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Attributes:
        down: ``nn.Linear(in_features, rank, bias=False)``.
        up: ``nn.Linear(rank, out_features, bias)``.

    Raises:
        LowRankError: if the rank is neither an integer of at least 1 nor a rule.

    Examples:
        >>> layer = lr.LowRankLinear(1024, 4096, rank=64)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
        >>> sum(p.numel() for p in layer.parameters()), 1024 * 4096 + 4096
        (331776, 4198400)
    """

    dense_type = nn.Linear
    _pivot: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        spectrum = pair_spectrum(out_features, in_features, None, type(self).__name__, pivot=self._pivot)
        rank = choose_rank(rank, spectrum, self._limit)
        self._build(rank, bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _build(self, rank: int, bias: bool, factory: dict[str, Any]) -> None:
        """Creates the children."""
        self.down = nn.Linear(self.in_features, rank, bias=False, **factory)
        self.up = nn.Linear(rank, self.out_features, bias=bias, **factory)

    @property
    def _limit(self) -> int:
        """The largest rank of use."""
        return min(self.in_features, self.out_features)

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.out_features

    def product(self) -> Tensor:
        """Multiplies out the dense weight ``[out_features, in_features]``, differentiably."""
        return self.up.weight @ self.down.weight

    def reset_parameters(self) -> None:
        """Draws new weights such that outputs have the variance that those of a new ``nn.Linear`` have."""
        reset_chain(self, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[*, in_features]`` to ``[*, out_features]``."""
        out: Tensor = self.up(self.down(input))
        return out

    def lift_(self) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """Returns the factor with the rows of the vocabulary, and a function that puts a resized one in its place."""

        def restore(resized: nn.Module) -> nn.Module:
            assert isinstance(resized, nn.Linear)
            self.up, self.out_features = resized, resized.out_features
            return self

        return self.up, restore

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankLinear:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``."""
        assert isinstance(dense, nn.Linear)
        with_bias = dense.bias is not None if bias is None else bias
        weight = dense.weight
        layer = cls(dense.in_features, dense.out_features, with_bias, "meta", weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=weight.device), dense)

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> LowRankLinear:
        """Factorizes a trained layer by its truncated SVD, with ``sqrt(S)`` on both sides.

        Args:
            linear: an ``nn.Linear``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.Linear``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.

        Examples:
            >>> linear = nn.Linear(64, 32)
            >>> full = lr.LowRankLinear.from_dense(linear, rank=32)
            >>> x = torch.randn(5, 64)
            >>> torch.allclose(full(x), linear(x), atol=1e-5)
            True
        """
        weight = check_dense(cls, linear)
        up, down = truncated_pair(weight, rank, cls.__name__)
        return fill(cls.like(linear, rank=len(down)), [down, up], bias_of(linear))

    def to_dense(self) -> nn.Linear:
        """Multiplies the factors out into the ``nn.Linear`` that computes the same."""
        up = self.up
        settings = {"bias": up.bias is not None, "device": up.weight.device, "dtype": up.weight.dtype}
        dense: nn.Linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, **settings)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if up.bias is not None:
                dense.bias.copy_(up.bias)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> SVD:
        """The weight ``[out_features, in_features]`` as an SVD."""
        return pair_factors(self.up.weight, self.down.weight)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.up.bias is not None}, rank={self.rank}"
        )
