"""Layers in pivot form in place of transformers' ``Conv1D``."""

from __future__ import annotations

from torch import Tensor, nn

from ..decompose.pair import pair_factors, truncated_pair
from ..factors import SVD
from ..rank import Rank
from .instance_checks import check_dense
from .pivot_linear import PivotLinear
from .transposed_linear import LowRankTransposedLinear
from .weights import bias_of


class PivotTransposedLinear(PivotLinear, LowRankTransposedLinear):
    """A :class:`PivotLinear` in place of transformers' ``Conv1D``, whose weight is stored as ``[in, out]``.

    Args:
        in_features: size of each input sample, Conv1D's ``nx``.
        out_features: size of each output sample, Conv1D's ``nf``.
        bias: whether the layer has a bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner dimension, as in :class:`LowRankLinear`.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Examples:
        >>> lr.PivotTransposedLinear(64, 192, rank=8)(torch.randn(2, 64)).shape
        torch.Size([2, 192])
    """

    dense_type = nn.Module  # type: ignore[assignment]
    pair_type = LowRankTransposedLinear

    def product(self) -> Tensor:
        """Multiplies out the dense weight ``[in_features, out_features]``, differentiably."""
        return PivotLinear.product(self).mT

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> PivotTransposedLinear:
        """Builds a layer with the settings, device and dtype of ``dense``, uninitialized but for the order."""
        layer = super().like(dense, rank=rank, bias=bias)
        assert isinstance(layer, PivotTransposedLinear)
        return layer

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> PivotTransposedLinear:
        """Factorizes a trained ``Conv1D`` by its truncated SVD, in pivot form.

        Args:
            linear: transformers' ``Conv1D``; it stays as it is.
            rank: an integer or a rank rule.
        """
        weight = check_dense(cls, linear)
        up, down = truncated_pair(weight.mT.double(), rank, cls.__name__, pivot=True)
        layer = cls.from_pair(linear, up, down, bias_of(linear))
        assert isinstance(layer, PivotTransposedLinear)
        return layer

    def factors(self) -> SVD:
        """The weight ``[in_features, out_features]`` as an SVD."""
        return pair_factors(self.basis.mT, self.up.weight.mT)
