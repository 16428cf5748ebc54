"""Low-rank layers in place of transformers' ``Conv1D``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..decompose.pair import pair_factors, truncated_pair
from ..errors import MissingExtraError
from ..factors import SVD
from ..rank import Rank
from .conv1d import is_conv1d_class
from .conversion import adopt, adopt_dense, fill
from .instance_checks import check_dense
from .linear import LowRankLinear
from .weights import bias_of, weight_of


class LowRankTransposedLinear(LowRankLinear):
    """A low-rank layer in place of transformers' ``Conv1D``, a linear layer whose weight is stored as ``[in, out]``.

    It computes what :class:`LowRankLinear` does. Its own class lets a compressed GPT-2 be saved, loaded and multiplied
    out again.

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
        >>> lr.LowRankTransposedLinear(64, 192, rank=8)(torch.randn(2, 64)).shape
        torch.Size([2, 192])
    """

    dense_type = nn.Module  # type: ignore[assignment]

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Returns whether a module is transformers' ``Conv1D``, not of a subclass."""
        return is_conv1d_class(type(module))

    @classmethod
    def dense_name(cls) -> str:
        """Name of the dense layer for messages."""
        return "transformers' Conv1D"

    def product(self) -> Tensor:
        """Multiplies out the dense weight ``[in_features, out_features]``, differentiably."""
        return super().product().mT

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankTransposedLinear:
        """Builds an uninitialized layer with the settings, device and dtype of ``dense``, which always has a bias."""
        weight = weight_of(dense)
        layer = cls(weight.shape[0], weight.shape[1], True, "meta", weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=weight.device), dense)

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> LowRankTransposedLinear:
        """Factorizes a trained ``Conv1D`` by its truncated SVD, with ``sqrt(S)`` on both sides.

        Args:
            linear: transformers' ``Conv1D``; it stays as it is.
            rank: an integer or a rank rule.
        """
        weight = check_dense(cls, linear)
        up, down = truncated_pair(weight.mT, rank, cls.__name__)
        return fill(cls.like(linear, rank=len(down)), [down, up], bias_of(linear))

    @staticmethod
    def blank(nf: int, nx: int, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Builds an uninitialized ``Conv1D`` from transformers' own arguments.

        Args:
            nf: number of outputs.
            nx: number of inputs.
            device: device of the parameters.
            dtype: dtype of the parameters.
        """
        try:
            from transformers.pytorch_utils import Conv1D
        except ImportError:
            raise MissingExtraError(
                "this model has transformers' Conv1D layers; install the extra: pip install"
                " 'lowrank-layers[transformers]'."
            ) from None
        with torch.device("meta"):
            empty = Conv1D(nf, nx).to(dtype)
        filled: nn.Module = empty.to_empty(device=device)
        return filled

    def to_dense(self) -> nn.Module:  # type: ignore[override]
        """Multiplies the factors out into the ``Conv1D`` that computes the same."""
        dense = self.blank(self.out_features, self.in_features, self.up.weight.device, self.up.weight.dtype)
        with torch.no_grad():
            dense.get_parameter("weight").copy_(self.weight)
            dense.get_parameter("bias").copy_(self.up.bias)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> SVD:
        """The weight ``[in_features, out_features]`` as an SVD."""
        return pair_factors(self.down.weight.mT, self.up.weight.mT)
