"""Multi-head latent attention (DeepSeek's MLA) that decodes without expanding the cached latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import LowRankError, UnsupportedLayerError
from ...modules import check_model
from ..attend import attend
from ..masks import is_causal

NAME = "lowrank_mla"
"""Name under which absorbed decoding registers its attention in transformers."""


@dataclass(frozen=True, eq=False)
class SharedLatentSegment:
    r"""Tokens as one latent and one rotated key for all heads: :math:`k = (W_k c, r)` and :math:`v = W_v c`.

    Args:
        keys: the up-projection :math:`W_k`, ``[heads, size, rank]``.
        values: the up-projection :math:`W_v`, ``[heads, size, rank]``.
        latents: ``[batch, 1, tokens, rank]``.
        turned: the rotated keys, ``[batch, 1, tokens, rotated size]``.
    """

    keys: Tensor
    values: Tensor
    latents: Tensor
    turned: Tensor

    @property
    def heads(self) -> int:
        """Number of heads of keys and values."""
        return self.keys.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.latents.shape[2]

    def scores(self, rows: Tensor) -> Tensor:
        """As :meth:`Segment.scores`, with the rows brought into the subspace."""
        dtype, size = rows.dtype, self.keys.shape[1]
        inner = (rows[..., :size] @ self.keys.to(dtype)).flatten(1, 2)
        found = inner @ self.latents[:, 0].to(dtype).mT
        found = found + rows[..., size:].flatten(1, 2) @ self.turned[:, 0].to(dtype).mT
        split: Tensor = found.unflatten(1, rows.shape[1:3])
        return split

    def mixed(self, weights: Tensor) -> Tensor:
        """As :meth:`Segment.mixed`, with sums of latents lifted afterwards."""
        summed = weights.flatten(1, 2) @ self.latents[:, 0].to(weights.dtype)
        found: Tensor = summed.unflatten(1, weights.shape[1:3]) @ self.values.to(weights.dtype).mT
        return found

    def dense_keys(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_keys`."""
        lifted = self.latents.to(dtype) @ self.keys.to(dtype).mT
        return torch.cat([lifted, self.turned.to(dtype).expand(-1, self.heads, -1, -1)], -1)

    def dense_values(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Segment.dense_values`."""
        return self.latents.to(dtype) @ self.values.to(dtype).mT


class Absorbing:
    """Mixin for the class of a latent attention that decodes without expanding what is cached."""

    _plain_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the class' own forward, on a view of the module in which nothing is expanded where that is cheaper.

        Args:
            hidden_states: ``[batch, tokens, hidden size]``.
            *args: handed on.
            **kwargs: handed on.
        """
        run: Callable[..., Any] = self._plain_class.forward
        mask, past = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        known = not args and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4))
        if known and past is not None and _pays(self, hidden_states.shape[1]):
            grown = past.get_seq_length(cast(Any, self).layer_idx) > 0
            return run(_view(self) if grown else self, hidden_states, **kwargs)
        return run(self, hidden_states, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._plain_class,), self.__dict__


class Overlay:
    """An object with some attributes replaced.

    Args:
        base: the object that has the other attributes.
        **over: the attributes that are replaced, with their values.
    """

    def __init__(self, base: Any, **over: Any) -> None:
        self.__dict__.update(over, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def absorb_mla_(model: nn.Module) -> nn.Module:
    r"""Lets multi-head latent attentions (DeepSeek's MLA) decode from the cached latents without expanding them.

    A cache of transformers holds the latent :math:`c` and one rotated key :math:`r` per token; its forward forms
    :math:`k_h = (W_h c, r)` and :math:`v_h = V_h c` of *all* tokens for every new one. Here the scores are
    :math:`(W_h^T q_h)^T c + q_r^T r`, and :math:`V_h` is applied to the weighted sum of latents: as many bytes, the
    same numbers, and arithmetic that no longer has ``tokens * rank * heads * size`` in it. Prompts, and calls with so
    many new tokens that expanding takes fewer multiplications, run as before. Weights and their names stay.

    Args:
        model: the model, changed in place: its attentions become subclasses of their classes.

    Returns:
        The model.

    Raises:
        LowRankError: for a model without latent attention, or transformers before 5.15, whose caches hold expanded keys
            and values; nothing is changed then.

    Examples:
        >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V2-Lite")  # doctest: +SKIP
        >>> lr.absorb_mla_(model).generate(ids, max_new_tokens=100)  # doctest: +SKIP

    DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024, section
    2.1.2.
    """
    check_model(model)
    found = {
        name: each for name, each in model.named_modules() if isinstance(getattr(each, "kv_b_proj", None), nn.Module)
    }
    if not found:
        raise LowRankError(
            f"absorb_mla_: {type(model).__name__} has no latent attention (a module with kv_b_proj); for keys and"
            " values of another attention use factorize_kv_."
        )
    for name, module in found.items():
        _check(name, module)
    _register()
    for module in found.values():
        if not isinstance(module, Absorbing):
            module.__class__ = absorbing_class(type(module))
    return model


def absorbing_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an attention's class that decodes in the subspace.

    Args:
        cls: the class of the attention.
    """
    if cls not in _CLASSES:
        body = {"_plain_class": cls, "__module__": cls.__module__}
        _CLASSES[cls] = cast(type[nn.Module], type(f"Absorbing{cls.__name__}", (Absorbing, cls), body))
    return _CLASSES[cls]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _blank(cls: type[nn.Module]) -> nn.Module:
    _register()
    made: nn.Module = object.__new__(absorbing_class(cls))
    return made


def _check(name: str, module: Any) -> None:
    if not hasattr(module, "expand_kv"):
        import transformers

        raise UnsupportedLayerError(
            f"absorb_mla_: {name!r} is a {type(module).__name__} of transformers {transformers.__version__}, which"
            " caches expanded keys and values, expected one that caches latents; upgrade to transformers 5.15 or later."
        )
    if "forward" in vars(module):
        raise UnsupportedLayerError(
            f"absorb_mla_: {name!r} has a forward of its own (accelerate's hooks put one there); remove it first."
        )
    missing = [key for key in ("qk_nope_head_dim", "v_head_dim", "layer_idx", "config") if not hasattr(module, key)]
    if missing or getattr(module.kv_b_proj, "bias", None) is not None:
        what = f"without {missing}" if missing else "with a bias in kv_b_proj"
        raise UnsupportedLayerError(
            f"absorb_mla_: {name!r} is a {type(module).__name__} {what}, expected DeepSeek's layout."
        )
    if hasattr(module, "indexer"):
        raise UnsupportedLayerError(
            f"absorb_mla_: {name!r} is a {type(module).__name__}, which attends to tokens that an indexer picks,"
            " and does so by the name of the attention implementation; leave it as it is."
        )


def _pays(module: Any, count: int) -> bool:
    """Whether the subspace takes fewer multiplications per cached token and head: ``2 r q < (r + q) (k + v)``."""
    rank, sizes = module.kv_b_proj.in_features, module.qk_nope_head_dim + module.v_head_dim
    return bool(2 * rank * count < (rank + count) * sizes)


def _view(module: Any) -> Any:
    """The module, with the latents themselves as keys and values, and an attention that knows what they are."""
    config = Overlay(module.config, _attn_implementation=NAME)
    return Overlay(module, config=config, expand_kv=lambda latents, turned: (latents, turned))


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with latents as ``key`` and rotated keys as ``value``."""
    weight = module.kv_b_proj.weight.unflatten(0, (-1, module.qk_nope_head_dim + module.v_head_dim))
    keys, values = weight.split([module.qk_nope_head_dim, module.v_head_dim], 1)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    causal = is_causal(module, kwargs.get("is_causal"))
    out = attend(query, [SharedLatentSegment(keys, values, key, value)], mask=mask, scale=scaling, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
