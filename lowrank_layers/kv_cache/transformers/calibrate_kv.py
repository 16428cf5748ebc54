"""The transforms of a cache for a model of transformers: everything that calibration needs is read off the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...calibrate import Loss, Padding, SampledCrossEntropy, batch_loss, check_batches, frozen, quiet_eval
from ...errors import LowRankError
from ...modules import check_model
from ..calibrated_transforms import fit_transforms
from ..kv_transforms import KVTransforms
from ..settings import KVSettings


def calibrate_kv(
    model: nn.Module,
    batches: Iterable[Any],
    settings: KVSettings | None = None,
    *,
    loss: Loss | None = None,
    progress: bool = False,
) -> KVTransforms:
    """Finds once for all sequences in which directions a model's keys and values are stored, and what each is worth.

    A cache with calibrated directions needs no fit to the prompt, has no bases of its own, and spends its bits where
    the model's prediction feels errors. The result is stored beside the model: ``transforms.save(folder)``.

    It takes a forward and a backward pass per batch, in which what the model hands to its cache is looked at, and the
    loss's gradients there. The first tokens, which a cache keeps exact, do not count, nor does padding: attention sinks
    have gradients unlike those of all others.

    Args:
        model: a decoder of transformers, with any kind of attention that caches keys and values in all layers.
        batches: token ids, ``[batch, tokens]``, or dicts of the model's arguments; 10,000 tokens or more in all, of
            every kind of text that the model will read, in prompts about as long.
        settings: ``joint``, ``rope`` and ``keep_first`` of the cache that will be used; ``None`` takes the defaults.
        loss: what errors are measured by, as in :func:`calibrate`; ``None`` is :class:`SampledCrossEntropy` at
            temperature 1, which needs no labels: variances are then nats of the model's own prediction.
        progress: shows a progress bar.

    Returns:
        A pair of transforms per layer, for ``LowRankCache(subspaces=...)``.

    Raises:
        LowRankError: for settings with a rank, batches of another kind, and a model that does not cache keys and values
            in all its layers or rotates keys in an unknown way.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()
        >>> transforms = lr.calibrate_kv(model, [torch.randint(99, (2, 100))])
        >>> len(transforms), transforms.head_size, transforms.rope
        (2, 16, 'tile')
    """
    settings = KVSettings() if settings is None else settings
    if settings.by_rank or settings.rotated == "after":
        raise LowRankError(
            f"calibrate_kv: got rank={settings.rank!r} and rope={settings.rotated!r}, expected bits= and rope='before'"
            " or 'tile'; kv_subspaces takes a rank."
        )
    check_model(model, quantized=True)
    check_batches(batches, "calibrate_kv")
    if not hasattr(model, "config") or getattr(model.config, "is_encoder_decoder", False):
        raise LowRankError(f"calibrate_kv: got a {type(model).__name__}, expected a decoder of transformers.")
    from .kv_recorder import KVRecorder  # it needs transformers, which importing this library must not

    chosen: Loss = SampledCrossEntropy(1.0) if loss is None else loss
    recorder, keep_first = KVRecorder(model), settings.keep_first
    padding = Padding(model, lambda batch: _counted(batch, keep_first))
    with quiet_eval(model), frozen(model), padding, torch.enable_grad():
        for batch in tqdm(batches, desc="calibrate_kv", disable=not progress):
            counted = _counted(batch, keep_first)
            cache = recorder.cache(counted)
            named = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            mean = batch_loss(named | {"past_key_values": cache, "use_cache": True}, chosen, padding, "calibrate_kv")
            # of the sum over tokens: what an error of one of them costs
            (mean * counted.sum().to(mean.device)).backward()
    return fit_transforms(recorder.moments(), recorder.rotations(), settings)


def _counted(batch: Any, keep_first: int) -> Tensor:
    """The tokens of a batch that are data and that a cache does not keep exact for ever, ``[batch, tokens]``."""
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch if isinstance(batch, Mapping) else {}
    given = named.get("input_ids", named.get("inputs_embeds"))
    if not isinstance(given, Tensor) or given.ndim < 2:
        raise LowRankError(
            f"calibrate_kv: got a batch of type {type(batch).__name__}, expected token ids, [batch, tokens], or a dict"
            " with input_ids."
        )
    mask = named.get("attention_mask")
    real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if mask is None else mask != 0
    return real & (real.cumsum(1) > keep_first)
