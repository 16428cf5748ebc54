"""A layer's cache, made when its first tokens come: only they show its size, dtype, device and rotation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..kv_transforms import KVTransforms
from ..low_rank_kv import LowRankKV
from ..rope import Rotation
from ..settings import KVSettings
from ..subspace import Subspace
from . import errors
from .rope import RotationUnknown, rotation_of


@dataclass
class LayerFactory:
    """Makes the caches of a model's layers; layers with equal frequencies share one rotation.

    Args:
        settings: settings of every layer.
        subspaces: a pair of subspaces per layer; ``None`` fits them to the tokens.
        waits_for_budget: whether the ranks are chosen once all layers have the prompt.
        rotations: the rotations that were made so far.
    """

    settings: KVSettings
    subspaces: KVTransforms | Sequence[tuple[Subspace, Subspace]] | None
    waits_for_budget: bool
    rotations: list[Rotation] = field(default_factory=list)
    _warned: bool = False

    def of_encoder(self) -> LowRankKV:
        """The cache of a cross-attention, whose keys are not rotated by the decoder's positions."""
        if self.waits_for_budget:
            raise errors.budget_for_encoder()
        return LowRankKV(self.settings)

    def of_decoder(self, layer: int, keys: Tensor, attention: nn.Module | None, config: Any) -> LowRankKV:
        """The cache of a self-attention.

        Args:
            layer: index of the layer.
            keys: its first keys.
            attention: the attention that hands them over, if it is known.
            config: configuration of the model, if it is known.
        """
        if self.subspaces is not None and layer >= len(self.subspaces):
            raise errors.few_subspaces(len(self.subspaces), layer)
        rotation = self._rotation(layer, keys, attention, config)
        if isinstance(self.subspaces, KVTransforms):
            made = LowRankKV(self.settings, rotation)
            made.fits.plan = self.subspaces.plans(self.settings.mean_bits)[layer]
        else:
            made = LowRankKV(self.settings, rotation, None if self.subspaces is None else self.subspaces[layer])
        made.waits_for_budget = self.waits_for_budget
        return made

    def _rotation(self, layer: int, keys: Tensor, attention: nn.Module | None, config: Any) -> Rotation | None:
        own = getattr(attention, "config", None)
        config = config if own is None else own
        if self.settings.rotated == "after" or config is None or keys.ndim != 4:
            return None
        try:
            found = rotation_of(config, attention, layer, keys.shape[3])
        except RotationUnknown as reason:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"LowRankCache: {reason}; they are compressed as they come, which takes more rank for the same"
                    " error (rope='after' does so without this warning).",
                    stacklevel=4,
                )
            return None
        return None if found is None else self._shared(found.to(keys.device))

    def _shared(self, rotation: Rotation) -> Rotation:
        for known in self.rotations:
            if known.equals(rotation):
                return known
        self.rotations.append(rotation)
        return rotation
