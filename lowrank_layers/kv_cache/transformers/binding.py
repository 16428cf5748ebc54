"""What a cache finds out about the model that calls it: its attention module, and how it rotates keys."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..rotation import Rotation
from .versions import turned_last

ENCODED = ("key_value_states", "encoder_hidden_states")
"""Arguments of cross-attentions, and of decoders that have some."""
APPLY = ("apply_rotary_pos_emb", "apply_rotary_emb")


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module whose forward is running: ``update`` gets tensors only, and no sign of whose they are."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


def crosses(module: nn.Module | None, frame: FrameType | None) -> bool:
    """Whether a module that is running attends to what an encoder gave.

    Args:
        module: whose forward is running.
        frame: where it calls the cache, or deeper.
    """
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back
    return module is not None and frame is not None and any(frame.f_locals.get(name) is not None for name in ENCODED)


def text_config(config: Any) -> Any:
    """The decoder's, where there are several."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def depth_of(config: Any) -> int | None:
    """Layers of the decoder; some of transformers' configurations count their encoder's as the model's."""
    return getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)


def rotation_of(config: Any, module: nn.Module | None, layer: int, size: int) -> Rotation | None:
    """How a model rotates the keys of a layer; ``None`` if it does not.

    The frequencies are those at the start, also for rules that change them later (dynamic NTK, LongRoPE): what is
    turned back by an angle is turned on again by the same, so that others cost rank and never exactness.

    Args:
        config: the decoder's.
        module: its attention, if it is known.
        layer: which one.
        size: entries of a key.
    """
    if getattr(config, "model_type", None) in ("gptj", "codegen"):  # they have no class for it
        return Rotation.of(config.rotary_dim or size, interleaved=True)
    if not getattr(config, "rope_parameters", None) or not getattr(module, "use_rope", True):
        return None
    code = _code_of(config, module)
    kind = _rotary_class(code, module)
    if code is None or kind is None:
        return None
    types = getattr(config, "layer_types", None)
    layer_type = getattr(module, "layer_type", None) or (types[layer] if types and layer < len(types) else None)
    with torch.no_grad(), torch.device("cpu"):
        rotary = kind(config)
        by_type = getattr(rotary, f"{layer_type}_inv_freq", None)
        frequencies: Tensor = (rotary.inv_freq if by_type is None else by_type).detach().float()
        interleaved = _is_interleaved(code, rotary, layer_type, frequencies)
    start = size - 2 * len(frequencies) if turned_last(config) else 0
    if start < 0 or start + 2 * len(frequencies) > size:
        return None
    return Rotation(frequencies, interleaved, start)


def _code_of(config: Any, module: nn.Module | None) -> ModuleType | None:
    """The file that the attention stands in."""
    if module is not None:
        return sys.modules[type(module).__module__]
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _rotary_class(code: ModuleType | None, module: nn.Module | None) -> Any:
    """The file's class of rotary embeddings; with several, the one whose name begins as the attention's."""
    found = [
        kind
        for key, kind in ({} if code is None else vars(code)).items()
        if key.endswith("RotaryEmbedding") and "Vision" not in key and inspect.isclass(kind)
        if code is not None and kind.__module__ == code.__name__
    ]
    own = "" if module is None else type(module).__name__.replace("Attention", "")
    return next((kind for kind in found if kind.__name__.startswith(own)), found[0] if found else None)


def _is_interleaved(code: ModuleType, rotary: Any, layer_type: str | None, frequencies: Tensor) -> bool:
    """Which entries make a pair: the model's own function is tried on a key."""
    positions = torch.arange(3)
    key = torch.randn(1, 1, 3, 2 * len(frequencies), generator=torch.Generator().manual_seed(0))
    more = (layer_type,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    angles = rotary(key, positions[None], *more)
    apply = next((getattr(code, name) for name in APPLY if hasattr(code, name)), None)
    if apply is None:
        return False
    turned = apply(key, key, *(angles if isinstance(angles, tuple) else (angles,)))[1]
    # unit vectors: some rotations also scale
    ours = [Rotation(frequencies, inter).turn(key, positions).flatten() for inter in (False, True)]
    half, pairs = (torch.cosine_similarity(x, turned.flatten().float(), 0) for x in ours)
    return bool(pairs > half)
