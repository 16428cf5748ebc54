"""Multi-head attention with low-rank projections, and its conversion from and to ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LowRankError, UnsupportedLayerError
from ..rank import Rank
from .base import is_derived, refuse_scripting
from .conversion import carry_attributes, return_attributes
from .instance_checks import peculiarity
from .linear import LowRankLinear
from .unfused_attention import PROJECTIONS, UnfusedAttention
from .weights import bias_of, weight_of


class LowRankMultiheadAttention(UnfusedAttention):
    r"""Multi-head attention (Vaswani et al., 2017) whose query, key, value and output projections are low-rank layers.

    Torch's own module reads the weights of its projections itself; this one calls them as modules. A projection may
    also stay an ``nn.Linear``.

    Args:
        embed_dim: size of the model's vectors.
        num_heads: number of heads.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have a bias.
        add_bias_kv: whether to add a learned key and value to each sequence.
        add_zero_attn: whether to add a key and a value of zeros to each sequence.
        kdim: size of the keys; by default ``embed_dim``.
        vdim: size of the values; by default ``embed_dim``.
        batch_first: whether inputs are ``[N, L, E]`` in place of ``[L, N, E]``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: an integer or a rule for all projections, or four for query, key, value and output; ``None`` makes a
            projection an ``nn.Linear``.

    Shape:
        ``[L, N, E]`` (or ``[N, L, E]``, or ``[L, E]``) and keys, values of length ``S``, to the output of the same
        shape and the weights ``[N, L, S]``, as in ``nn.MultiheadAttention``.

    Attributes:
        q_proj: ``LowRankLinear(embed_dim, embed_dim)``.
        k_proj: ``LowRankLinear(kdim, embed_dim)``.
        v_proj: ``LowRankLinear(vdim, embed_dim)``.
        out_proj: ``LowRankLinear(embed_dim, embed_dim)``.

    Raises:
        LowRankError: for bad ranks, and sizes that the number of heads does not divide.

    Examples:
        >>> attention = lr.LowRankMultiheadAttention(64, 4, batch_first=True, rank=16)
        >>> x = torch.randn(2, 10, 64)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 10, 64])
        >>> dense = nn.MultiheadAttention(64, 4, batch_first=True).eval()
        >>> full = lr.LowRankMultiheadAttention.from_dense(dense, rank=64)
        >>> torch.allclose(full(x, x, x)[0], dense(x, x, x)[0], atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: Rank | Sequence[Rank | None] | None,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise LowRankError(
                f"LowRankMultiheadAttention: got embed_dim={embed_dim} and num_heads={num_heads}, expected a positive"
                " number of heads that divides the size."
            )
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (embed_dim, self.kdim, self.vdim, embed_dim)
        for name, width, each in zip(PROJECTIONS, widths, _four_ranks(rank), strict=True):
            projection: nn.Module
            if each is None:
                projection = nn.Linear(width, embed_dim, bias, **factory)
            else:
                projection = LowRankLinear(width, embed_dim, bias, **factory, rank=each)
            self.add_module(name, projection)
        self.bias_k = self.bias_v = None
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
            self.bias_v = nn.Parameter(torch.empty(1, 1, embed_dim, **factory))
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(type(self).__name__)

    @property
    def rank(self) -> tuple[int | None, ...]:
        """Ranks of the query, key, value and output projections; ``None`` where one is dense."""
        return tuple(getattr(getattr(self, name), "rank", None) for name in PROJECTIONS)

    @classmethod
    def from_dense(
        cls, attention: nn.Module, *, rank: Rank | Sequence[Rank | None] | None
    ) -> LowRankMultiheadAttention:
        """Factorizes the projections of a trained attention by their truncated SVDs.

        Args:
            attention: an ``nn.MultiheadAttention``.
            rank: as in the constructor; ``None`` leaves all four dense.

        Raises:
            UnsupportedLayerError: if it is not a plain ``nn.MultiheadAttention``.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        layer = cls.over(attention)
        for name, each in zip(PROJECTIONS, _four_ranks(rank), strict=True):
            dense = getattr(layer, name)
            copied = _copy(dense) if each is None else LowRankLinear.from_dense(dense, rank=each)
            setattr(layer, name, copied.train(attention.training))
        for name in ("bias_k", "bias_v"):
            old = getattr(layer, name)
            if old is not None:
                setattr(layer, name, nn.Parameter(old.detach().clone(), old.requires_grad))
        return layer

    @classmethod
    def over(cls, attention: nn.Module) -> LowRankMultiheadAttention:
        """Builds the same attention with four ``nn.Linear`` projections that share memory with its weights."""
        if type(attention) is not nn.MultiheadAttention:
            raise UnsupportedLayerError(
                f"{cls.__name__}.from_dense: got {type(attention).__name__}, expected nn.MultiheadAttention itself."
            )
        weights = ["in_proj_weight", *(f"{name}_weight" for name in PROJECTIONS[:3])]
        if any(map(is_derived, attention.modules())) or any(name not in attention._parameters for name in weights):
            raise UnsupportedLayerError(f"{cls.__name__}.from_dense: a weight is parametrized; fold it first.")
        for strange in filter(None, map(peculiarity, attention.modules())):
            raise UnsupportedLayerError(f"{cls.__name__}.from_dense: got one that cannot be converted: {strange}.")
        size = attention.embed_dim
        settings = {"bias": False, "device": "meta", "kdim": attention.kdim, "vdim": attention.vdim}
        layer = cls(
            size,
            attention.num_heads,
            attention.dropout,
            add_zero_attn=attention.add_zero_attn,
            batch_first=attention.batch_first,
            rank=None,
            **settings,
        )
        fused, joint = attention.in_proj_weight, attention.in_proj_bias
        for k, name in enumerate(PROJECTIONS[:3]):
            weight = getattr(attention, f"{name}_weight") if fused is None else fused[k * size : (k + 1) * size]
            learns = (weight if fused is None else fused).requires_grad
            linear = getattr(layer, name)
            linear.weight = nn.Parameter(weight.detach(), learns)
            if joint is not None:
                linear.bias = nn.Parameter(joint.detach()[k * size : (k + 1) * size], joint.requires_grad)
        for key, old in attention.out_proj._parameters.items():
            setattr(layer.out_proj, key, None if old is None else nn.Parameter(old.detach(), old.requires_grad))
        layer.bias_k, layer.bias_v = (attention._parameters.get(key) for key in ("bias_k", "bias_v"))
        carry_attributes(layer, attention)
        return layer.train(attention.training)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """Multiplies the factors out into the ``nn.MultiheadAttention`` that computes the same."""
        projections = [getattr(self, name) for name in PROJECTIONS]
        biases = [bias_of(projection) for projection in projections]
        first = weight_of(projections[0])
        dense: nn.MultiheadAttention = nn.utils.skip_init(
            nn.MultiheadAttention,
            self.embed_dim,
            self.num_heads,
            self.dropout,
            any(bias is not None for bias in biases),
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device=first.device,
            dtype=first.dtype,
        )
        weights = [weight_of(projection) for projection in projections]
        fused = dense._parameters["in_proj_weight"]
        if fused is not None:
            fused.copy_(torch.cat(weights[:3]))
        else:
            for name, weight in zip(PROJECTIONS[:3], weights[:3], strict=True):
                dense.get_parameter(f"{name}_weight").copy_(weight)
        dense.out_proj.weight.copy_(weights[3])
        if dense.in_proj_bias is not None:
            known = [first.new_zeros(self.embed_dim) if bias is None else bias for bias in biases]
            dense.in_proj_bias.copy_(torch.cat(known[:3]))
            dense.out_proj.bias.copy_(known[3])
        for name in ("bias_k", "bias_v"):
            extra = getattr(self, name)
            if extra is not None:
                dense.get_parameter(name).copy_(extra)
        for key, old in dense.named_parameters():
            old.requires_grad_(any(p.requires_grad for p in self._sources(key)))
        return_attributes(dense, self)
        return dense.train(self.training)

    def _sources(self, key: str) -> list[nn.Parameter]:
        """The parameters from which one parameter of ``nn.MultiheadAttention`` is computed."""
        if key in ("bias_k", "bias_v"):
            return [self.get_parameter(key)]
        bias = key.endswith("bias")
        names = ["out_proj"] if key.startswith("out") else [key.removesuffix("_weight")]
        names = list(PROJECTIONS[:3]) if key.startswith("in_proj") else names
        found = [pair for name in names for pair in getattr(self, name).named_parameters()]
        return [parameter for own, parameter in found if own.endswith("bias") == bias]

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, rank={self.rank}"


def _four_ranks(rank: Any) -> tuple[Any, ...]:
    """Returns one rank per projection, or raises."""
    if not isinstance(rank, Sequence) or isinstance(rank, str):
        return (rank,) * len(PROJECTIONS)
    if len(rank) != len(PROJECTIONS):
        raise LowRankError(
            f"LowRankMultiheadAttention: got rank {rank!r}, expected one, or four for query, key, value and output."
        )
    return tuple(rank)


def _copy(linear: nn.Linear) -> nn.Linear:
    """Copies a linear layer that may share memory with others."""
    weight = linear.weight
    settings = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
    new: nn.Linear = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, **settings)
    for name, old in linear.named_parameters():
        parameter = new.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(old)
        parameter.requires_grad_(old.requires_grad)
    return new
