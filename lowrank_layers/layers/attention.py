"""nn.MultiheadAttention with its four projections as layers of their own, which can then be low-rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LowRankError, UnsupportedLayerError
from ..rank import Rank
from .base import is_derived, refuse_scripting
from .conversion import carry_attributes, return_attributes
from .instance_checks import peculiarity
from .linear import LowRankLinear
from .weights import bias_of, weight_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LowRankMultiheadAttention(nn.Module):
    r"""Multi-head attention (Vaswani et al., 2017) whose query, key, value and output projections are pairs.

    Torch's own module reads its weights itself, fused where it can, and skips its children in eval mode; this one calls
    them. A projection may also stay an ``nn.Linear``.

    Args:
        embed_dim: size of the model.
        num_heads: number of heads.
        dropout: on the attention weights, in training.
        bias: whether the projections have a bias.
        add_bias_kv: adds a learned key and value.
        add_zero_attn: adds a key and a value of zeros.
        kdim: size of the keys; ``None`` is ``embed_dim``.
        vdim: size of the values; ``None`` is ``embed_dim``.
        batch_first: ``[N, L, E]`` in the place of ``[L, N, E]``.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rank: an integer or a rule for all projections, or four of them for query, key, value and output, where ``None``
            is an ``nn.Linear``.

    Shape:
        ``[L, N, E]`` (or ``[N, L, E]``, or ``[L, E]``) and keys, values of length ``S``, to the output of the same
        shape and the weights ``[N, L, S]``, as in ``nn.MultiheadAttention``.

    Attributes:
        q_proj: ``LowRankLinear(embed_dim, embed_dim)``.
        k_proj: ``LowRankLinear(kdim, embed_dim)``.
        v_proj: ``LowRankLinear(vdim, embed_dim)``.
        out_proj: ``LowRankLinear(embed_dim, embed_dim)``.

    Raises:
        LowRankError: for bad ranks, and sizes that the heads do not divide.

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

    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None
    """What torch's transformer layers look at before they leave the path through ``forward``."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

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
        for name, width, each in zip(PROJECTIONS, widths, four_ranks(rank), strict=True):
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
        """Those of query, key, value and output; ``None`` where a projection is dense."""
        return tuple(getattr(getattr(self, name), "rank", None) for name in PROJECTIONS)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``nn.MultiheadAttention.forward`` takes and returns; nested tensors are not taken."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise LowRankError("LowRankMultiheadAttention: got a nested tensor; pass padded ones and key_padding_mask.")
        if is_causal and attn_mask is None:
            raise LowRankError("LowRankMultiheadAttention: is_causal is a hint for attn_mask, which is missing.")
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        plain = self.bias_k is None and not self.add_zero_attn
        causal = is_causal and key_padding_mask is None and not need_weights and plain
        mask = None if causal else _join_masks(attn_mask, key_padding_mask, q, k)
        chance = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), chance)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, chance, causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, ``[N, heads, L, head_dim]``."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), -1, -1)], 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return (q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) if self.add_zero_attn else (q, k, v)

    @classmethod
    def from_dense(
        cls, attention: nn.Module, *, rank: Rank | Sequence[Rank | None] | None
    ) -> LowRankMultiheadAttention:
        """The best pairs of those ranks for a trained attention: the truncated SVD of every projection.

        Args:
            attention: an ``nn.MultiheadAttention``, with equal or other ``kdim`` and ``vdim``.
            rank: as in the constructor; ``None`` leaves all four dense.

        Raises:
            UnsupportedLayerError: for anything else, a subclass included.
            LowRankError: for NaN, Inf, integer or meta weights and bad ranks.
        """
        layer = cls.over(attention)
        for name, each in zip(PROJECTIONS, four_ranks(rank), strict=True):
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
        """The same attention with four ``nn.Linear`` that share the memory of its weights."""
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
        """The ``nn.MultiheadAttention`` that computes the same."""
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
        """The parameters behind one of ``nn.MultiheadAttention``'s."""
        if key in ("bias_k", "bias_v"):
            return [self.get_parameter(key)]
        bias = key.endswith("bias")
        names = ["out_proj"] if key.startswith("out") else [key.removesuffix("_weight")]
        names = list(PROJECTIONS[:3]) if key.startswith("in_proj") else names
        found = [pair for name in names for pair in getattr(self, name).named_parameters()]
        return [parameter for own, parameter in found if own.endswith("bias") == bias]

    def extra_repr(self) -> str:
        """The settings, as printed."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}, rank={self.rank}"


def four_ranks(rank: Any) -> tuple[Any, ...]:
    """One rank for each projection."""
    if not isinstance(rank, Sequence) or isinstance(rank, str):
        return (rank,) * len(PROJECTIONS)
    if len(rank) != len(PROJECTIONS):
        raise LowRankError(
            f"LowRankMultiheadAttention: got rank {rank!r}, expected one, or four for query, key, value and output."
        )
    return tuple(rank)


def _join_masks(attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores ``[N, heads, L, S]``; added keys are never masked."""
    joint = None
    if attention is not None:
        split = attention.unflatten(0, (-1, q.shape[1])) if attention.ndim == 3 else attention
        joint = _additive(split, q, k)
    if padding is not None:
        mask = _additive(padding, q, k)[:, None, None]
        joint = mask if joint is None else joint + mask
    return joint


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
    return F.pad(mask.to(q.dtype), (0, k.shape[-2] - mask.shape[-1]))


def _copy(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    settings = {"bias": linear.bias is not None, "device": weight.device, "dtype": weight.dtype}
    new: nn.Linear = nn.utils.skip_init(nn.Linear, linear.in_features, linear.out_features, **settings)
    for name, old in linear.named_parameters():
        parameter = new.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(old)
        parameter.requires_grad_(old.requires_grad)
    return new
