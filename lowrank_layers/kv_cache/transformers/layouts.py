"""Which of transformers' attentions are laid out as Llama's, and how they rotate: read off them, then tried out."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedLayerError
from ..rope import Rotation
from .latent_attention import LatentAttention, LatentProjection, norm_of

OUTPUTS = ("o_proj", "dense", "out_proj")
"""Names of output projections."""
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
"""Names of projections to queries, keys and values at once."""
_TRIED = 6
_CLOSE = 1e-3

Turning = tuple[Rotation | None, float]
"""A rotation, and what it multiplies the scores of turned entries by."""


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Self-attentions of transformers' decoders, by name; fused ones too."""
    for name, module in model.named_modules():
        named = dict(module.named_children())
        if hasattr(module, "layer_idx") and ("k_proj" in named or any(fused in named for fused in FUSED)):
            yield name, module


def output_of(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the output projection."""
    return next(((name, child) for name, child in attention.named_children() if name in OUTPUTS), None)


def check_layout(name: str, attention: nn.Module) -> None:
    """Refuses what is known beforehand to be laid out otherwise."""
    kind = type(attention).__name__
    config = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    fused = next((child for child in FUSED if hasattr(attention, child)), None)
    reason = None
    if "forward" in vars(attention):
        reason = "has a forward of its own (accelerate's hooks put one there); remove it first"
    elif isinstance(attention, LatentAttention):
        reason = "is factorized already; load the model again to choose other ranks"
    elif fused is not None:
        reason = f"is a {kind}, whose {fused!r} makes queries, keys and values at once; split it into three first"
    elif "key_value_states" in inspect.signature(attention.forward).parameters:
        reason = f"is a {kind}, which may attend to another sequence; only decoders without an encoder are supported"
    elif output_of(attention) is None or config is None or not hasattr(attention, "head_dim"):
        reason = f"is a {kind}, expected q_proj, k_proj, v_proj, one of {list(OUTPUTS)}, config and head_dim"
    elif any("mrope_section" in each for each in _rope_tables(rope)):
        reason = f"is a {kind} whose positions have several axes, and the index in the cache gives one"
    elif any(each.get("rope_type") in ("dynamic", "longrope") for each in _rope_tables(rope)):
        reason = f"is a {kind} whose frequencies change with the length; set another rope_type"
    elif getattr(config, "clip_qkv", None) is not None:
        reason = f"is a {kind} that clips keys, which no latent holds"
    elif any(
        norm is not None and not _over_head(norm, attention) for norm in (norm_of(attention, side) for side in "qk")
    ):
        reason = f"is a {kind} with a norm over more than a head's entries, which needs the whole key at once"
    if reason is not None:
        raise UnsupportedLayerError(f"factorize_kv_: {name!r} {reason}.")


def turning(name: str, attention: nn.Module) -> Turning:
    """How an attention rotates, once an attention of ours has computed the same for random inputs.

    Raises:
        UnsupportedLayerError: if none does.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            model: Any = copy.deepcopy(attention).to("cpu", torch.float32).eval()
            model.config._attn_implementation = "eager"
            hidden = torch.randn(2, _TRIED, model.k_proj.in_features)
            mask = torch.full((_TRIED, _TRIED), torch.finfo(torch.float32).min).triu(1)[None, None]
            found, given = _read(model, hidden)
            exact = model(hidden_states=hidden, position_embeddings=given, attention_mask=mask, past_key_values=None)
            for each in found:
                ours = _with_whole_keys(model, each)(hidden, given, mask)[0]
                if float((ours - exact[0]).norm()) <= _CLOSE * float(exact[0].norm()):
                    return each
        except Exception as error:
            raise UnsupportedLayerError(
                f"factorize_kv_: {name!r} is a {type(attention).__name__}, whose attention could not be tried"
                f" ({type(error).__name__}: {error}); leave it out with target=."
            ) from error
    raise UnsupportedLayerError(
        f"factorize_kv_: {name!r} is a {type(attention).__name__}, which computes something else between its"
        " projections than norms over a head, a rotation and a softmax; leave it out with target=."
    )


def _rope_tables(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every layer type, where there are several."""
    nested = [each for each in rope.values() if isinstance(each, dict)]
    return nested or [rope]


def _over_head(norm: nn.Module, attention: nn.Module) -> bool:
    return all(list(p.shape) == [attention.head_dim] for p in norm.parameters())


def _read(attention: Any, hidden: Tensor) -> tuple[list[Turning], object]:
    """Rotations that may be the attention's, and the embeddings that its model would give it."""
    config = attention.config
    plain: list[Turning] = [(None, 1.0)]
    if not getattr(config, "rope_parameters", None):
        return plain, None
    home = sys.modules[type(attention).__module__]
    kinds: list[Any] = [
        each
        for key, each in vars(home).items()
        if inspect.isclass(each) and key.endswith("RotaryEmbedding") and "Vision" not in key
    ]
    own = type(attention).__name__.partition("Attention")[0]
    rotary = next((each for each in kinds if each.__name__.startswith(own)), kinds[0])(config)
    kind = getattr(attention, "layer_type", None)
    if kind is None and getattr(config, "layer_types", None):
        kind = config.layer_types[attention.layer_idx]
    index = torch.arange(hidden.shape[1])[None]
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    given = rotary(hidden, index, kind) if by_type else rotary(hidden, index)
    prefix = "" if hasattr(rotary, "inv_freq") else f"{kind}_"
    frequencies = getattr(rotary, f"{prefix}inv_freq").detach().clone().float()
    scale = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    turned: list[Turning] = [(Rotation(frequencies, interleaved), scale**2) for interleaved in (False, True)]
    return [*turned, *plain], given


def _with_whole_keys(attention: Any, how: Turning) -> LatentAttention:
    """An attention of ours whose latents are the keys and values themselves."""
    sides = []
    for linear in (attention.k_proj, attention.v_proj):
        down = nn.Linear(linear.in_features, linear.out_features, bias=False)
        down.weight.copy_(linear.weight)
        sides.append(LatentProjection(down, [torch.eye(linear.out_features)[None]], linear.bias, 1))
    output = output_of(attention)
    assert output is not None
    return LatentAttention(attention, sides[0], sides[1], output, *how)
