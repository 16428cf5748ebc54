"""Self-attention of transformers' Llama layout whose cache holds latents instead of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import LowRankError
from ..attend import attend
from ..coefficients import FloatCoefficients
from ..compressed_tokens import CompressedTokens, HeadGroups, Heads
from ..masks import is_causal
from ..rope import Rotation
from ..segments import CompressedSegment, ExactSegment, Segment
from ..subspace import Subspace
from .latent_tokens import NormedKeys, UnliftedValues


class LatentProjection(nn.Module):
    """A key or value projection as ``up (down x) + bias``, where ``down x`` is what is cached.

    Args:
        down: the projection to the latents of all groups of heads, side by side.
        ups: up-projections ``[groups, width, rank]``: one tensor for all groups, or one tensor per group where their
            ranks differ; none where the output projection has taken them in.
        bias: the bias of all heads, added after the up-projection; ``None`` where there is none.
        groups: number of groups of heads, each with latents of its own.

    Shape:
        ``[*, in_features]`` to ``[*, latents]``.

    Examples:
        >>> down, up = nn.Linear(256, 24, bias=False), torch.randn(1, 2 * 64, 24)
        >>> keys = lr.kv_cache.LatentProjection(down, [up], None, groups=1)
        >>> latents = keys(torch.randn(1, 10, 256))[:, None]
        >>> latents.shape, keys.parts(latents, size=64)[0].rebuilt(0, 10, torch.float32).shape
        (torch.Size([1, 1, 10, 24]), torch.Size([1, 2, 10, 64]))
    """

    def __init__(self, down: nn.Linear, ups: Sequence[Tensor], bias: Tensor | None, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.down = down
        trained = down.weight.requires_grad
        self.up = nn.ParameterList([nn.Parameter(up, requires_grad=trained) for up in ups])
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """The latents that are cached.

        Args:
            input: hidden states, ``[*, in_features]``.
        """
        out: Tensor = self.down(input)
        return out

    def parts(self, latents: Tensor, size: int) -> list[HeadGroups]:
        """Cached latents as the groups of heads that attention reads.

        Args:
            latents: ``[batch, 1, tokens, all ranks]``.
            size: number of entries of a head.
        """
        ranks = [up.shape[0] * up.shape[2] for up in self.up]
        widths = [up.shape[0] * up.shape[1] for up in self.up]
        means = [None] * len(widths) if self.bias is None else self.bias.split(widths)
        found = []
        for index, (up, rows, mean) in enumerate(zip(self.up, latents[:, 0].split(ranks, 2), means, strict=True)):
            groups, width, _ = up.shape
            basis = up[None]
            middle = basis.new_zeros(1, groups, width) if mean is None else mean.view(1, groups, width)
            heads: Heads = slice(None) if len(ranks) == 1 else [index]
            # a view: the cache of transformers owns the latents
            coefficients = FloatCoefficients(rows.dtype, {"values": by_group(rows, groups)})
            found.append(HeadGroups(heads, size, Subspace(basis, middle), coefficients))
        return found


class LatentAttention(nn.Module):
    """Self-attention whose cache holds latents instead of keys and values; ``factorize_kv_`` puts it into a model.

    The children keep their names; ``k_proj`` and ``v_proj`` are :class:`LatentProjection`. Keys are rebuilt from the
    latents tile by tile (those of a prompt all at once), normed where the model norms them, and rotated by their index
    in the cache, as queries are: with padding on the left both are off by the same number, and only the difference
    counts.

    Args:
        attention: the attention that is replaced; its attributes and other children are taken over.
        keys: the key projection.
        values: the value projection; without its up-projections the output projection takes latents.
        output: name and module of the output projection.
        rotation: the rotation of queries and keys; ``None`` where there is none.
        turned_scale: factor of the scores of rotated entries (YaRN scales its cosines and sines).
    """

    head_dim: int
    layer_idx: int
    q_proj: nn.Module
    k_proj: LatentProjection
    v_proj: LatentProjection

    def __init__(
        self,
        attention: nn.Module,
        keys: LatentProjection,
        values: LatentProjection,
        output: tuple[str, nn.Module],
        rotation: Rotation | None,
        turned_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.__dict__.update({key: value for key, value in vars(attention).items() if not key.startswith("_")})
        for name, parameter in attention.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        changed = {"k_proj": keys, "v_proj": values, output[0]: output[1]}
        for name, child in attention.named_children():
            self.add_module(name, changed.get(name, child))
        self.output_name = output[0]
        self.turned_scale = turned_scale
        self.rotation = rotation
        self._place(rotation)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers calls it; weights are never returned.

        Args:
            hidden_states: ``[batch, tokens, hidden size]``.
            position_embeddings: ignored, as tokens are rotated by their index in the cache.
            attention_mask: ``[batch, 1, q, tokens]``: true where to attend, or what to add to the scores.
            past_key_values: the cache; ``None`` for none.
            **kwargs: ``is_causal`` is honoured, others are ignored.

        Returns:
            The outputs, and ``None`` in place of attention weights.
        """
        batch, count = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).view(batch, count, -1, self.head_dim)
        norm = norm_of(self, "q")
        query = (query if norm is None else norm(query)).transpose(1, 2)
        keys, values = self.k_proj(hidden_states)[:, None], self.v_proj(hidden_states)[:, None]
        if past_key_values is not None:
            if getattr(past_key_values, "is_compileable", False):
                raise LowRankError(
                    f"factorize_kv_: got a {type(past_key_values).__name__}, whose length is fixed beforehand, expected"
                    " one that grows; leave cache_implementation out, or give a DynamicCache."
                )
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        tokens = keys.shape[2]
        if self.rotation is not None:
            if self.rotation.frequencies.device != query.device:
                self._place(self.rotation.to(query.device))
            query = self._turned(query, torch.arange(tokens - count, tokens, device=query.device))
        out = attend(
            query,
            [self._segment(keys, values, whole=2 * count > tokens)],
            mask=check_mask(attention_mask, tokens),
            scale=getattr(self, "scaling", None),
            causal=is_causal(self, kwargs.get("is_causal")),
            softcap=getattr(self, "attn_logit_softcapping", None),
            sinks=getattr(self, "sinks", None),
        )
        if not len(self.v_proj.up):
            out = out[..., : values.shape[3] // self.v_proj.groups]
        projected: Tensor = self.get_submodule(self.output_name)(out.transpose(1, 2).reshape(batch, count, -1))
        return projected, None

    def _segment(self, keys: Tensor, values: Tensor, *, whole: bool) -> Segment:
        """All tokens; rebuilt as a whole where most are new, since a prompt goes through one fused attention then."""
        old = self._compressed(keys, values)
        if not whole:
            return old
        dense_keys, dense_values = old.dense_keys(keys.dtype), old.dense_values(keys.dtype)
        # fused attention takes values as wide as the keys, and as many heads
        share = dense_keys.shape[1] // dense_values.shape[1]
        dense_values = F.pad(dense_values, (0, self.head_dim - dense_values.shape[3])).repeat_interleave(share, 1)
        return ExactSegment(dense_keys, dense_values)

    def _compressed(self, keys: Tensor, values: Tensor) -> CompressedSegment:
        plain, norm = CompressedTokens(self.k_proj.parts(keys, self.head_dim), 0.0), norm_of(self, "k")
        old_keys = plain if norm is None else NormedKeys(plain, norm)
        if len(self.v_proj.up):
            lifted = CompressedTokens(self.v_proj.parts(values, self.head_dim), 0.0)
            return CompressedSegment(old_keys, lifted, self.rotation, 0)
        latents = by_group(values[:, 0], self.v_proj.groups)
        return CompressedSegment(old_keys, UnliftedValues(latents), self.rotation, 0)

    def _turned(self, query: Tensor, index: Tensor) -> Tensor:
        assert self.rotation is not None
        turned = self.rotation.turn(query, index)
        if self.turned_scale == 1.0:
            return turned
        size = 2 * len(self.rotation.frequencies)
        return torch.cat([turned[..., :size] * self.turned_scale, turned[..., size:]], -1)

    def _place(self, rotation: Rotation | None) -> None:
        """Keeps a rotation with its cosines made now: made in inference mode, no gradient could pass them later."""
        with torch.inference_mode(False):
            if rotation is not None:
                rotation.nbytes()
            self.rotation = rotation


def norm_of(attention: nn.Module, side: str) -> nn.Module | None:
    """The norm of queries or keys over a head, if there is one.

    Args:
        attention: an attention of transformers, or ours.
        side: ``"q"`` or ``"k"``.
    """
    found = getattr(attention, f"{side}_norm", None) or getattr(attention, f"{side}_layernorm", None)
    return found if isinstance(found, nn.Module) else None


def by_group(rows: Tensor, groups: int) -> Tensor:
    """Latents ``[batch, tokens, all ranks]`` as ``[batch, groups, rank, tokens]``, a view.

    Args:
        rows: latents of all groups, side by side.
        groups: number of groups.
    """
    found: Tensor = rows.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
    return found


def check_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The part of a mask that is about the tokens of the cache.

    Args:
        mask: what the model handed over.
        tokens: number of tokens of the cache.

    Raises:
        LowRankError: for a mask of another kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        got = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise LowRankError(
            f"factorize_kv_: got an attention mask {got}, expected [batch, 1, queries, tokens]; use"
            " model.set_attn_implementation('sdpa') or 'eager': the latents have an attention of their own."
        )
    return mask[..., :tokens]
