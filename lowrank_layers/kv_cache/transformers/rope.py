"""How a model of transformers rotates its keys: read off its classes, then tried out on a key."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..rope import Rotation
from .versions import turned_last

APPLY = ("apply_rotary_pos_emb", "apply_rotary_emb", "apply_multimodal_rotary_pos_emb")
"""Names of the functions that turn queries and keys."""
_ALIKE = 1 - 1e-4
_POSITIONS = 3


class RotationUnknown(Exception):
    """What a model does to its keys is none of the rotations that can be taken off them."""


def rotation_of(config: Any, module: nn.Module | None, layer: int, size: int) -> Rotation | None:
    """How a model rotates the keys of a layer; ``None`` if it does not.

    The frequencies are those at the start, also for rules that change them later (dynamic NTK, LongRoPE): what is
    turned back by an angle is turned on again by the same, so that others cost rank and never exactness.

    Args:
        config: the decoder's.
        module: its attention, if it is known.
        layer: which one.
        size: entries of a key.

    Raises:
        RotationUnknown: if it does, and how cannot be found.
    """
    if getattr(config, "model_type", None) in ("gptj", "codegen"):  # they have no class for it
        return Rotation.of(config.rotary_dim or size, interleaved=True)
    if not getattr(config, "rope_parameters", None) or not getattr(module, "use_rope", True):
        return None
    found, reason = None, "no function of its file turns keys as RoPE does"
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = _read(config, module, layer, size)
    except Exception as error:  # whatever another library's class asks for that this one does not know
        reason = f"{type(error).__name__}: {error}"
    if found is None:
        name = getattr(config, "model_type", None) or type(config).__name__
        raise RotationUnknown(
            f"how {name} rotates its keys could not be read ({reason}); they are compressed as they come, which takes"
            " more rank for the same error"
        )
    return found


def _read(config: Any, module: nn.Module | None, layer: int, size: int) -> Rotation | None:
    code = _code_of(config, module)
    kind = _rotary_class(code, module)
    if code is None or kind is None:
        return None
    rotary, layer_type = kind(config), _layer_type(config, module, layer)
    by_type = getattr(rotary, f"{layer_type}_inv_freq", None)
    frequencies: Tensor = (rotary.inv_freq if by_type is None else by_type).detach().float()
    width = 2 * len(frequencies)
    if width > size:
        return None
    angles = _angles(rotary, layer_type, width)
    functions = [getattr(code, name) for name in APPLY if hasattr(code, name)]
    last = size - width
    # a whole head first: a function that takes one shows which entries it turns
    tries = [(size, start) for start in sorted({0, last})] if last else []
    for function, (given, start), sign, interleaved in itertools.product(
        functions, [*tries, (width, 0)], (1, -1), (False, True)
    ):
        if _is(Rotation(sign * frequencies, interleaved, start), function, angles, given):
            shift = start if given == size else last if turned_last(config) else 0
            return Rotation(sign * frequencies, interleaved, shift)
    return None


def _is(rotation: Rotation, function: Callable[..., Any], angles: Any, size: int) -> bool:
    """Whether a model's own function turns a key so, whichever of heads and tokens comes first."""
    key = torch.randn(1, 2, _POSITIONS, size, generator=torch.Generator().manual_seed(0))
    part = slice(rotation.start, rotation.start + 2 * len(rotation.frequencies))
    ours = rotation.turn(key, torch.arange(_POSITIONS))
    for swapped in (False, True):
        try:
            turned = _turned(function, key.transpose(1, 2).contiguous() if swapped else key, angles)
        except Exception:  # made for the other order, or for other arguments
            continue
        turned = turned.transpose(1, 2) if swapped else turned
        if turned.shape != ours.shape:
            continue
        turned = turned.float()
        # by direction: some rotations also scale
        alike = torch.cosine_similarity(ours[..., part].flatten(), turned[..., part].flatten(), 0)
        outside = torch.ones(size, dtype=torch.bool)
        outside[part] = False
        if alike > _ALIKE and torch.allclose(ours[..., outside], turned[..., outside], atol=1e-5):
            return True
    return False


def _turned(function: Callable[..., Any], key: Tensor, angles: Any) -> Tensor:
    """The key that comes out, by the names that the function gives its arguments."""
    named = dict(zip(("cos", "sin"), angles, strict=True)) if isinstance(angles, tuple) else {"freqs_cis": angles}
    asked = [p.name for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    given = {name: named.get(name, key) for name in asked}
    if "mrope_section" in given:  # one axis of positions is as good as three that agree
        pairs = named["cos"].shape[-1] // 2
        given |= {"mrope_section": [pairs, 0, 0], "cos": angles[0].expand(3, -1, -1, -1)}
        given["sin"] = angles[1].expand(3, -1, -1, -1)
    found = function(**given)
    turned: Tensor = found[1] if isinstance(found, tuple) else found
    return turned


def _angles(rotary: Any, layer_type: str | None, width: int) -> Any:
    """What the model computes for a few positions; some models have three of them for a token."""
    like, positions = torch.zeros(1, 1, _POSITIONS, width), torch.arange(_POSITIONS)[None]
    more = (layer_type,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    try:
        found = rotary(like, positions, *more)
    except (IndexError, RuntimeError):
        found = rotary(like, positions.expand(3, 1, -1), *more)
    if isinstance(found, tuple):
        return tuple(x[0] if x.ndim == 4 else x for x in found)
    return found


def _layer_type(config: Any, module: nn.Module | None, layer: int) -> str | None:
    """The name that a layer's frequencies go by, where layers differ."""
    types = getattr(config, "layer_types", None)
    own = getattr(module, "rope_layer_type", None) or getattr(module, "layer_type", None)
    return own or (types[layer] if types and layer < len(types) else None)


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
    found = list(_rotary_classes(code)) if code is not None else []
    own = "" if module is None else type(module).__name__.replace("Attention", "")
    return next((kind for kind in found if kind.__name__.startswith(own)), found[0] if found else None)


def _rotary_classes(code: ModuleType) -> Iterator[type]:
    for name, kind in vars(code).items():
        own = inspect.isclass(kind) and kind.__module__ == code.__name__
        if own and name.endswith("RotaryEmbedding") and "Vision" not in name:
            yield kind
