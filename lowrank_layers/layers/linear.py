"""Linear layers as a pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..decompose import svd
from ..errors import MissingExtraError
from ..factors import SVD
from ..linalg import exact_svd, working_dtype
from ..rank import Rank, choose_rank, pair_spectrum as pair_spectrum
from .base import FactoredModule
from .conv1d import is_conv1d_class
from .conversion import adopt, adopt_dense, fill
from .initialization import reset_chain
from .instance_checks import check_dense
from .weights import bias_of, weight_of


class LowRankLinear(FactoredModule):
    r"""Applies :math:`y = U (V x) + b`, a linear map of rank at most ``rank``.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether a bias is added.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: inner dimension: an integer (clamped to ``min(in_features, out_features)``) or a rule that
            needs no weights, such as ``ParameterFraction(0.3)``.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Attributes:
        down: ``nn.Linear(in_features, rank, bias=False)``.
        up: ``nn.Linear(rank, out_features, bias)``.

    Raises:
        LowRankError: if the rank is no integer of at least 1 and no rule.

    Examples:
        >>> layer = lr.LowRankLinear(1024, 4096, rank=64)
        >>> layer(torch.randn(8, 1024)).shape
        torch.Size([8, 4096])
        >>> sum(p.numel() for p in layer.parameters()), 1024 * 4096 + 4096
        (331776, 4198400)
    """

    dense_type = nn.Linear

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
        rank = choose_rank(rank, pair_spectrum(out_features, in_features, None, type(self).__name__), self._limit)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def _limit(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def rank(self) -> int:
        """Size of the inner dimension."""
        return self.down.out_features

    def product(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, multiplied out, differentiable."""
        return self.up.weight @ self.down.weight

    def reset_parameters(self) -> None:
        """Draws new weights with the output variance of a fresh ``nn.Linear``."""
        reset_chain(self, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """``[*, in_features]`` to ``[*, out_features]``."""
        out: Tensor = self.up(self.down(input))
        return out

    def lift_(self) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """The last factor, which has the rows of a vocabulary, and what takes it back with more or fewer."""

        def restore(resized: nn.Module) -> nn.Module:
            assert isinstance(resized, nn.Linear)
            self.up, self.out_features = resized, resized.out_features
            return self

        return self.up, restore

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankLinear:
        """A layer with the settings, device and dtype of ``dense``, uninitialized."""
        assert isinstance(dense, nn.Linear)
        with_bias = dense.bias is not None if bias is None else bias
        weight = dense.weight
        layer = cls(dense.in_features, dense.out_features, with_bias, "meta", weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=weight.device), dense)

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> LowRankLinear:
        """The best pair of that rank for a trained layer: its truncated SVD, ``sqrt(S)`` on both sides.

        Args:
            linear: an ``nn.Linear``.
            rank: an integer or a rank rule.

        Raises:
            UnsupportedLayerError: if it is anything but a plain ``nn.Linear``.
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
        """The ``nn.Linear`` that computes the same."""
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
        """The settings, as printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.up.bias is not None}, rank={self.rank}"
        )


class LowRankTransposedLinear(LowRankLinear):
    """The pair in the place of transformers' ``Conv1D``, a linear layer whose weight is stored as ``[in, out]``.

    In a model definition :class:`LowRankLinear` does the same; this one remembers what it stands for, so that a
    compressed GPT-2 can be saved, loaded and multiplied out again.

    Args:
        in_features: size of each input sample, Conv1D's ``nx``.
        out_features: size of each output sample, Conv1D's ``nf``.
        bias: whether a bias is added.
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
        """Whether this is transformers' ``Conv1D`` itself, not a subclass."""
        return is_conv1d_class(type(module))

    @classmethod
    def dense_name(cls) -> str:
        """What users call the dense layer."""
        return "transformers' Conv1D"

    def product(self) -> Tensor:
        """The dense weight ``[in_features, out_features]``, multiplied out, differentiable."""
        return super().product().mT

    @classmethod
    def like(cls, dense: nn.Module, *, rank: int, bias: bool | None = None) -> LowRankTransposedLinear:
        """A layer with the settings, device and dtype of ``dense``, uninitialized; Conv1D always has a bias."""
        weight = weight_of(dense)
        layer = cls(weight.shape[0], weight.shape[1], True, "meta", weight.dtype, rank=rank)
        return adopt(layer.to_empty(device=weight.device), dense)

    @classmethod
    def from_dense(cls, linear: nn.Module, *, rank: Rank) -> LowRankTransposedLinear:
        """The best pair of that rank for a trained ``Conv1D``."""
        weight = check_dense(cls, linear)
        up, down = truncated_pair(weight.mT, rank, cls.__name__)
        return fill(cls.like(linear, rank=len(down)), [down, up], bias_of(linear))

    @staticmethod
    def blank(nf: int, nx: int, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """A ``Conv1D`` with transformers' own arguments, uninitialized."""
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
        """The ``Conv1D`` that computes the same."""
        dense = self.blank(self.out_features, self.in_features, self.up.weight.device, self.up.weight.dtype)
        with torch.no_grad():
            dense.get_parameter("weight").copy_(self.weight)
            dense.get_parameter("bias").copy_(self.up.bias)
        adopt_dense(dense, self)
        return dense

    def factors(self) -> SVD:
        """The weight ``[in_features, out_features]`` as an SVD."""
        return pair_factors(self.down.weight.mT, self.up.weight.mT)


def truncated_pair(matrix: Tensor, rank: Rank, owner: str) -> tuple[Tensor, Tensor]:
    """``(U sqrt(S), sqrt(S) V^T)`` of a matrix at the rank that ``rank`` means for it."""
    limit = min(matrix.shape)
    known = isinstance(rank, int)
    # singular values may be beyond what half precision holds, whose roots are within
    wide = matrix.to(working_dtype(matrix))
    full = None if known else svd(wide)
    values = None if full is None else full.s
    chosen = choose_rank(rank, pair_spectrum(matrix.shape[0], matrix.shape[1], values, owner), limit)
    up, down = (svd(wide, chosen) if full is None else full.truncate(chosen)).pair()
    return up.to(matrix.dtype), down.to(matrix.dtype)


def pair_factors(up: Tensor, down: Tensor) -> SVD:
    """The SVD of ``up @ down`` through the QR decompositions of both, never forming the product."""
    dtype = up.dtype
    left, right = torch.linalg.qr(up.detach().double()), torch.linalg.qr(down.detach().double().mT)
    u, s, vh = exact_svd(left.R @ right.R.mT)
    return SVD((left.Q @ u).to(dtype), s.to(dtype), (vh @ right.Q.mT).to(dtype))
