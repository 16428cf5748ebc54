"""What a model does to keys between their projection and its cache: known beforehand, then tried out on few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import quiet_eval
from ...errors import LowRankError
from ..rope import Rotation
from .rope import RotaryEmbedding, RotationUnknown, rotation_of

_TRIED = 8
_CLOSE = 0.05
"""Relative error that bfloat16 stays below, and any other computation does not."""


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """How an attention makes the keys in its cache from what ``k_proj`` puts out.

    Args:
        rotation: what rotates them; ``None`` if nothing does.
        factors: what multiplies the entries of a head (YaRN), ``[size]``.
    """

    rotation: Rotation | None
    factors: Tensor

    @classmethod
    def of(cls, attention: Any, size: int) -> CachedKeys:
        """As the model's classes tell.

        Args:
            attention: a self-attention of a decoder.
            size: number of entries of a head.

        Raises:
            LowRankError: if keys are rotated in a way that cannot be found.
        """
        config, layer, factors = attention.config, attention.layer_idx, torch.ones(size)
        try:
            rotation = rotation_of(config, attention, layer, size)
        except RotationUnknown as reason:
            raise LowRankError(f"calibrate_kv: {reason}; without subspaces= they are fitted to the prompt.") from None
        rotary = None if rotation is None else RotaryEmbedding.of(config, attention, layer)
        if rotation is not None and rotary is not None:
            factors[rotation.start :][: 2 * len(rotation.frequencies)] = rotary.scaling
        return cls(rotation, factors)

    def undone(self, keys: Tensor) -> Tensor:
        """What the projection must have put out, ``[tokens, heads * size]``.

        Args:
            keys: keys in a cache from its start on, ``[1, heads, tokens, size]``.
        """
        keys = keys.float().cpu()
        if self.rotation is not None:
            keys = self.rotation.turn(keys, -torch.arange(keys.shape[2]))
        return (keys / self.factors).transpose(1, 2).flatten(2)[0]


@torch.no_grad()
def check_cached(model: nn.Module, batch: Any, attentions: Mapping[str, Any], keys: Sequence[CachedKeys]) -> None:
    """Raises if a model caches other keys and values than its projections put out, on the first tokens of a batch.

    Args:
        model: a decoder of transformers.
        batch: token ids, or a dict with the model's arguments.
        attentions: its attentions by name.
        keys: how their keys are made.

    Raises:
        LowRankError: for a model that does something else.
    """
    from transformers import DynamicCache

    outputs: dict[nn.Module, Tensor] = {}
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    given = {name: value[:1, :_TRIED] for name, value in named.items() if name in ("input_ids", "inputs_embeds")}
    cache: Any = DynamicCache()
    with ExitStack() as undo:
        for attention in attentions.values():
            for layer in (attention.k_proj, attention.v_proj):
                undo.callback(layer.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out)).remove)
        with quiet_eval(model):
            model(**given, past_key_values=cache, use_cache=True)
    for (name, attention), own, held in zip(attentions.items(), keys, cache.layers, strict=True):
        values = held.values.float().cpu().transpose(1, 2).flatten(2)[0]
        for layer, found in ((attention.k_proj, own.undone(held.keys)), (attention.v_proj, values)):
            expected = outputs[layer][0].float().cpu()
            if expected.shape != found.shape or float((found - expected).norm()) > _CLOSE * float(expected.norm()):
                side = "k_proj" if layer is attention.k_proj else "v_proj"
                raise LowRankError(
                    f"calibrate_kv: {name!r} is a {type(attention).__name__}, which does more than rotate what {side}"
                    " puts out (a norm?), so that calibration does not see what it caches; without subspaces= they are"
                    " fitted to the prompt."
                )
