"""The moments of all that a model hands to its cache, and of the loss's gradients there."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ...calibrate.moments import Moments
from ...errors import LowRankError
from ..calibrated_transforms import SideMoments
from ..rope import Rotation
from .calling_model import calling_module, text_config
from .rope import RotationUnknown, rotation_of
from .versions import caches_latents


@dataclass(eq=False)
class _Side:
    """The moments of the keys, or the values, of one layer.

    Args:
        size: number of entries per head.
        rotation: what is taken off them first.
        device: where they come.
        rows: moments of the keys or values.
        gradients: moments of the gradients.
    """

    size: int
    rotation: Rotation | None
    device: torch.device
    rows: Moments
    gradients: Moments

    @classmethod
    def of(cls, x: Tensor, rotation: Rotation | None) -> _Side:
        moments = [Moments.zeros(x.shape[1] * x.shape[3], x.device) for _ in range(2)]
        return cls(x.shape[3], rotation, x.device, *moments)

    def watch(self, x: Tensor, counted: Tensor) -> Tensor:
        """Takes keys or values in, ``[batch, heads, tokens, size]``, and their gradient once it comes."""
        if not x.requires_grad:  # nothing before it has gradients
            x = x.detach().requires_grad_()
        self.rows.update(self._rows(x.detach(), counted))
        x.register_hook(lambda gradient: self.gradients.update(self._rows(gradient.detach(), counted)))
        return x

    def moments(self) -> SideMoments:
        return SideMoments(self.rows.mean, self.rows.covariance(), self.gradients.second, self.size, self.device)

    def _rows(self, x: Tensor, counted: Tensor) -> Tensor:
        x = x.float()
        if self.rotation is not None:  # as a cache takes it off: by the index of the token
            x = self.rotation.turn(x, -torch.arange(x.shape[2], device=x.device))
        return x.transpose(1, 2).flatten(2)[counted.to(x.device)]


@dataclass(eq=False)
class KVRecorder:
    """Gives a model one cache per batch, and takes the moments of what comes there.

    Args:
        model: a decoder of transformers.
        layers: keys and values of every layer that came so far, by its index.
    """

    model: nn.Module
    layers: dict[int, tuple[_Side, _Side]] = field(default_factory=dict)

    def cache(self, counted: Tensor) -> DynamicCache:
        """The cache for a batch.

        Args:
            counted: which tokens count, ``[batch, tokens]``.
        """
        return _RecordingCache(self, counted)

    def record(
        self, keys: Tensor, values: Tensor, layer: int, attention: Any, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Takes in what an attention hands to its cache, and returns it.

        Args:
            keys: ``[batch, heads, tokens, size]``, rotated.
            values: likewise.
            layer: the index of the layer.
            attention: the attention.
            counted: which tokens count.
        """
        if layer not in self.layers:
            if keys.ndim != 4 or caches_latents(attention):
                raise LowRankError(
                    f"calibrate_kv: layer {layer} is a {type(attention).__name__}, which caches no keys and values of"
                    " heads but latents, and they stay exact in a LowRankCache."
                )
            config = getattr(attention, "config", None) or text_config(getattr(self.model, "config", None))
            try:
                rotation = rotation_of(config, attention, layer, keys.shape[3])
            except RotationUnknown as reason:
                raise LowRankError(
                    f"calibrate_kv: {reason}; without subspaces= they are fitted to the prompt."
                ) from None
            self.layers[layer] = _Side.of(keys, rotation), _Side.of(values, None)
        own = self.layers[layer]
        return own[0].watch(keys, counted), own[1].watch(values, counted)

    def moments(self) -> list[tuple[SideMoments, SideMoments]]:
        """What was taken, by layer.

        Raises:
            LowRankError: if a layer has handed nothing to its cache, heads differ in size, or entries are not finite.
        """
        found = [self.layers[layer] for layer in sorted(self.layers)]
        sizes = {keys.size for keys, _ in found}
        if not found or sorted(self.layers) != list(range(len(found))) or len(sizes) > 1:
            raise LowRankError(
                f"calibrate_kv: got keys of the layers {sorted(self.layers)} with heads of {sorted(sizes)} entries,"
                " expected those of all layers, with heads of one size."
            )
        for layer, side in ((layer, side) for layer, pair in enumerate(found) for side in pair):
            gradients = side.gradients.second
            if not bool((side.rows.second.isfinite() & gradients.isfinite()).all()):
                raise LowRankError(
                    f"calibrate_kv: layer {layer} has NaN or Inf in its keys, values or gradients; look at the batches."
                )
            if not bool(gradients.any()):
                raise LowRankError(
                    f"calibrate_kv: the loss has no gradient at the keys or values of layer {layer}; use longer texts,"
                    " or SampledCrossEntropy()."
                )
        return [(keys.moments(), values.moments()) for keys, values in found]

    def rotations(self) -> list[Rotation | None]:
        """The rotations of the keys of all layers."""
        return [self.layers[layer][0].rotation for layer in sorted(self.layers)]


class _RecordingCache(DynamicCache):
    def __init__(self, recorder: KVRecorder, counted: Tensor) -> None:
        super().__init__()
        self._recorder, self._counted = recorder, counted

    # mypy reads the signature of the newest version
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        attention = calling_module(sys._getframe(1))
        recorded = self._recorder.record(key_states, value_states, layer_idx, attention, self._counted)
        found: tuple[Tensor, Tensor] = super().update(*recorded, layer_idx, *args, **kwargs)
        return found
