"""How a model of transformers rotates its keys (RoPE): read off its classes, then tried out on a key."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..rope import Rotation

APPLY = ("apply_rotary_pos_emb", "apply_rotary_emb", "apply_multimodal_rotary_pos_emb")
"""Names of the functions that rotate queries and keys."""
_ALIKE = 1 - 1e-4
_POSITIONS = 3


class RotationUnknown(Exception):
    """What a model does to its keys is none of the rotations that can be taken off them."""


@dataclass(frozen=True)
class RotaryEmbedding:
    """A rotary embedding of a model's own class, as one of its attentions sees it.

    Args:
        module: the rotary embedding.
        layer_type: the name that this attention's frequencies go by; ``None`` where all layers have the same.
    """

    module: Any
    layer_type: str | None

    @classmethod
    def of(cls, config: Any, attention: nn.Module | None, layer: int) -> RotaryEmbedding | None:
        """The embedding that a model makes for an attention; ``None`` if its file has no class of them.

        Args:
            config: the configuration of the decoder.
            attention: the attention, if it is known.
            layer: the index of its layer.
        """
        kind = _rotary_class(_code_of(config, attention), attention)
        return None if kind is None else cls(kind(config), _layer_type(config, attention, layer))

    @property
    def frequencies(self) -> Tensor:
        """The angle per position of each pair of entries."""
        found: Tensor = self._own("inv_freq", None)
        return found.detach().clone().float()

    @property
    def scaling(self) -> float:
        """The factor of cosines and sines (YaRN)."""
        return float(self._own("attention_scaling", 1.0))

    def angles(self, like: Tensor, positions: Tensor) -> Any:
        """What the model hands to its attentions: cosines and sines, or complex numbers.

        Args:
            like: a tensor with the dtype and device of the hidden states.
            positions: ``[1, tokens]``.
        """
        more = (self.layer_type,) if "layer_type" in inspect.signature(self.module.forward).parameters else ()
        try:
            return self.module(like, positions, *more)
        except (IndexError, RuntimeError):  # made for three axes of positions per token
            return self.module(like, positions.expand(3, 1, -1), *more)

    def _own(self, name: str, default: Any) -> Any:
        """An attribute of the module, by layer type where it has several."""
        return getattr(self.module, f"{self.layer_type}_{name}", getattr(self.module, name, default))


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The parameters of a model's rotations, one entry per layer type; none if it does not rotate."""
    found = getattr(config, "rope_parameters", None) or {}
    by_type = [each for each in found.values() if isinstance(each, dict)]
    return by_type or ([found] if found else [])


def rotation_of(config: Any, attention: nn.Module | None, layer: int, size: int) -> Rotation | None:
    """The rotation of the keys of a layer; ``None`` if they are not rotated.

    The frequencies are those at the start, also for rules that change them later (dynamic NTK, LongRoPE): what is
    rotated back by an angle is rotated forth by the same, so that others cost rank and never exactness.

    Args:
        config: the configuration of the decoder.
        attention: the attention, if it is known.
        layer: the index of its layer.
        size: number of entries of a key.

    Raises:
        RotationUnknown: if keys are rotated in a way that cannot be found.
    """
    if getattr(config, "model_type", None) in ("gptj", "codegen"):  # they have no class for it
        return Rotation.of(config.rotary_dim or size, interleaved=True)
    if not rope_parameters(config) or not getattr(attention, "use_rope", True):
        return None
    if config.model_type == "cohere2" and getattr(attention, "sliding_window", 0) is None:
        return None
    found, reason = None, "no function of its file rotates keys as RoPE does"
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = _tried_out(config, attention, layer, size)
    except Exception as error:  # whatever another library's class asks for that this one does not know
        reason = f"{type(error).__name__}: {error}"
    if found is None:
        name = getattr(config, "model_type", None) or type(config).__name__
        raise RotationUnknown(f"how {name} rotates its keys could not be read ({reason})")
    return found


def _tried_out(config: Any, attention: nn.Module | None, layer: int, size: int) -> Rotation | None:
    """The rotation that does to a key what a function of the model's file does to it."""
    rotary = RotaryEmbedding.of(config, attention, layer)
    if rotary is None:
        return None
    frequencies = rotary.frequencies
    width = 2 * len(frequencies)
    if width > size:
        return None
    angles = _of_one_axis(rotary.angles(torch.zeros(1, 1, _POSITIONS, width), torch.arange(_POSITIONS)[None]))
    code = _code_of(config, attention)
    functions = [getattr(code, name) for name in APPLY if hasattr(code, name)]
    last = size - width
    # a whole head first: a function that takes one shows which entries it rotates
    tries = [(size, start) for start in sorted({0, last})] if last else []
    for function, (given, start), sign, interleaved in itertools.product(
        functions, [*tries, (width, 0)], (1, -1), (False, True)
    ):
        if _is(Rotation(sign * frequencies, interleaved, start), function, angles, given):
            # a function that takes the rotated entries only: in MLA, whose expanded keys are cached until 5.14, they
            # are a head's last
            shift = last if getattr(config, "qk_rope_head_dim", None) is not None else 0
            return Rotation(sign * frequencies, interleaved, start if given == size else shift)
    return None


def _is(rotation: Rotation, function: Callable[..., Any], angles: Any, size: int) -> bool:
    """Whether a model's own function rotates a key so, whichever of heads and tokens comes first."""
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


def _of_one_axis(angles: Any) -> Any:
    """Angles of the first axis, where positions have several."""
    return tuple(x[0] if x.ndim == 4 else x for x in angles) if isinstance(angles, tuple) else angles


def _layer_type(config: Any, attention: nn.Module | None, layer: int) -> str | None:
    """The name that a layer's frequencies go by, where layers differ."""
    types = getattr(config, "layer_types", None)
    own = getattr(attention, "rope_layer_type", None) or getattr(attention, "layer_type", None)
    return own or (types[layer] if types and layer < len(types) else None)


def _code_of(config: Any, attention: nn.Module | None) -> ModuleType | None:
    """The module of Python in which the attention's class is defined."""
    if attention is not None:
        return sys.modules[type(attention).__module__]
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _rotary_class(code: ModuleType | None, attention: nn.Module | None) -> Any:
    """The file's class of rotary embeddings; with several, the one whose name begins as the attention's."""
    found = list(_rotary_classes(code)) if code is not None else []
    own = "" if attention is None else type(attention).__name__.partition("Attention")[0]
    return next((kind for kind in found if kind.__name__.startswith(own)), found[0] if found else None)


def _rotary_classes(code: ModuleType) -> Iterator[type]:
    for name, kind in vars(code).items():
        own = inspect.isclass(kind) and kind.__module__ == code.__name__
        if own and name.endswith("RotaryEmbedding") and "Vision" not in name:
            yield kind
