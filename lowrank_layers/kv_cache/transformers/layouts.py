"""Which attentions of transformers are laid out as Llama's: by their attributes, then by trying them out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedLayerError
from ..rope import Rotation
from .latent_attention import LatentAttention, LatentProjection, norm_of
from .rope import RotaryEmbedding, rope_parameters, rotation_of

OUTPUTS = ("o_proj", "dense", "out_proj")
"""Names of output projections."""
FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
"""Names of projections to queries, keys and values at once."""
_TRIED = 6
_CLOSE = 1e-3


def decoder_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the self-attentions of transformers' decoders, also of those with fused projections."""
    for name, module in model.named_modules():
        named = dict(module.named_children())
        if hasattr(module, "layer_idx") and ("k_proj" in named or any(fused in named for fused in FUSED)):
            yield name, module


def output_of(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the output projection."""
    return next(((name, child) for name, child in attention.named_children() if name in OUTPUTS), None)


def check_layout(name: str, attention: nn.Module) -> None:
    """Raises if an attention is known beforehand to be laid out otherwise."""
    kind = type(attention).__name__
    config = getattr(attention, "config", None)
    rope = rope_parameters(config)
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
    elif any("mrope_section" in parameters for parameters in rope):
        reason = f"is a {kind} whose positions have several axes, and the index in the cache gives one"
    elif any(parameters.get("rope_type") in ("dynamic", "longrope") for parameters in rope):
        reason = f"is a {kind} whose frequencies change with the length; set another rope_type"
    elif getattr(config, "clip_qkv", None) is not None:
        reason = f"is a {kind} that clips keys, which no latent holds"
    elif any(
        norm is not None and not _over_head(norm, attention) for norm in (norm_of(attention, side) for side in "qk")
    ):
        reason = f"is a {kind} with a norm over more than a head's entries, which needs the whole key at once"
    if reason is not None:
        raise UnsupportedLayerError(f"factorize_kv_: {name!r} {reason}.")


def rotation_tried_out(name: str, attention: nn.Module) -> tuple[Rotation | None, float]:
    """The rotation of an attention, once an attention of ours has computed the same for random inputs.

    Args:
        name: name of the attention, for messages.
        attention: an attention that :func:`check_layout` has let pass.

    Returns:
        The rotation, ``None`` if there is none, and the factor of the scores of rotated entries (YaRN).

    Raises:
        UnsupportedLayerError: if the attention computes something else.
    """
    kind = type(attention).__name__
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            dense: Any = copy.deepcopy(attention).to("cpu", torch.float32).eval()
            dense.config._attn_implementation = "eager"
            hidden = torch.randn(2, _TRIED, dense.k_proj.in_features)
            mask = torch.full((_TRIED, _TRIED), torch.finfo(torch.float32).min).triu(1)[None, None]
            candidates, angles = _candidates(dense, hidden)
            exact = dense(hidden_states=hidden, position_embeddings=angles, attention_mask=mask, past_key_values=None)
            for candidate in candidates:
                ours = _with_whole_keys(dense, *candidate)(hidden, angles, mask)[0]
                if float((ours - exact[0]).norm()) <= _CLOSE * float(exact[0].norm()):
                    return candidate
        except Exception as error:
            raise UnsupportedLayerError(
                f"factorize_kv_: {name!r} is a {kind}, whose attention could not be tried"
                f" ({type(error).__name__}: {error}); leave it out with target=."
            ) from error
    raise UnsupportedLayerError(
        f"factorize_kv_: {name!r} is a {kind}, which computes something else between its projections than norms over a"
        " head, a rotation and a softmax; leave it out with target=."
    )


def _over_head(norm: nn.Module, attention: nn.Module) -> bool:
    return all(list(p.shape) == [attention.head_dim] for p in norm.parameters())


def _candidates(attention: Any, hidden: Tensor) -> tuple[list[tuple[Rotation | None, float]], object]:
    """Rotations that may be the attention's, and the position embeddings that its model would give it."""
    plain: list[tuple[Rotation | None, float]] = [(None, 1.0)]
    config, layer = attention.config, attention.layer_idx
    rotary = RotaryEmbedding.of(config, attention, layer) if rope_parameters(config) else None
    if rotary is None:
        return plain, None
    angles = rotary.angles(hidden, torch.arange(hidden.shape[1])[None])
    # some models rotate in some of their layers only, and say so in their code
    return [(rotation_of(config, attention, layer, attention.head_dim), rotary.scaling**2), *plain], angles


def _with_whole_keys(attention: Any, rotation: Rotation | None, scale: float) -> LatentAttention:
    """An attention of ours whose latents are the keys and values themselves."""
    sides = []
    for linear in (attention.k_proj, attention.v_proj):
        down = nn.Linear(linear.in_features, linear.out_features, bias=False)
        down.weight.copy_(linear.weight)
        sides.append(LatentProjection(down, [torch.eye(linear.out_features)[None]], linear.bias, 1))
    output = output_of(attention)
    assert output is not None
    return LatentAttention(attention, sides[0], sides[1], output, rotation, scale)
