"""The transforms of a cache for a model of transformers: everything that calibration needs is read off the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...calibrate import Loss, SampledCrossEntropy, calibrate, check_batches
from ...errors import LowRankError
from ..calibrated_subspaces import kv_subspaces
from ..kv_transforms import KVTransforms
from ..settings import KVSettings
from ..transform import Transform
from .cached_keys import CachedKeys, check_cached
from .layouts import FUSED, decoder_attentions


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
    the model's prediction feels errors. The result is stored beside the model: ``transforms.save(folder)``. Only the
    moments of ``k_proj`` and ``v_proj`` are taken, in a forward and a backward pass per batch. The first tokens, which
    a cache keeps exact, do not count: attention sinks have gradients unlike those of all others.

    Args:
        model: a decoder of transformers with ``k_proj`` and ``v_proj`` in each of its attentions, and no norm of keys.
        batches: token ids, ``[batch, tokens]``, or dicts of the model's arguments, as for :func:`calibrate`.
        settings: ``joint``, ``rope`` and ``keep_first`` of the cache that will be used; ``None`` takes the defaults.
        loss: what errors are measured by; ``None`` is :class:`SampledCrossEntropy` at temperature 1, which needs no
            labels: variances then predict the KL divergence of the model's predictions.
        progress: shows a progress bar.

    Returns:
        A pair of transforms per layer, for ``LowRankCache(subspaces=...)``.

    Raises:
        LowRankError: for settings with a rank, batches of another kind, and a model that caches something else than
            what its projections put out, rotated.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()
        >>> transforms = lr.calibrate_kv(model, [torch.randint(99, (2, 100))])
        >>> len(transforms), transforms.head_size, transforms.rope
        (2, 16, 'tile')
    """
    settings = KVSettings() if settings is None else settings
    if settings.by_rank:
        raise LowRankError("calibrate_kv: got settings with a rank, expected bits; kv_subspaces takes a rank.")
    check_batches(batches, "calibrate_kv")
    held = [_without_full_mask(batch) for batch in batches]
    keep_first = settings.keep_first
    masks = [_stored(batch, keep_first) for batch in held]
    if not masks:
        raise LowRankError("calibrate_kv: got no batches.")
    attentions = _attentions(model)
    size = int(next(iter(attentions.values())).head_dim)
    keys = [CachedKeys.of(attention, size) for attention in attentions.values()]
    check_cached(model, held[0], attentions, keys)
    stats = calibrate(
        model,
        held,
        SampledCrossEntropy(1.0) if loss is None else loss,
        target=[f"{name}.{child}" for name in attentions for child in ("k_proj", "v_proj")],
        mask=lambda batch: _stored(batch, keep_first),
        progress=progress,
    )
    rotations = [own.rotation for own in keys]
    found = kv_subspaces(model, stats, settings, head_size=size, rotation=rotations)
    assert isinstance(found, KVTransforms)
    scaled = [(_scaled(pair[0], own), pair[1]) for pair, own in zip(found, keys, strict=True)]
    return replace(found, layers=tuple(scaled))


def _attentions(model: nn.Module) -> dict[str, Any]:
    """The attentions of a decoder by name, one per layer."""
    named: dict[str, Any] = dict(decoder_attentions(model))
    for name, attention in named.items():
        fused = next((child for child in FUSED if hasattr(attention, child)), None)
        if fused is not None:
            raise LowRankError(
                f"calibrate_kv: {name!r} makes queries, keys and values at once ({fused!r}), expected k_proj and"
                " v_proj; split it into three first."
            )
    indices = [attention.layer_idx for attention in named.values()]
    if not indices or indices != list(range(len(indices))):
        raise LowRankError(
            f"calibrate_kv: found attentions with k_proj of the layers {indices}, expected one for each layer of a"
            " decoder of transformers, from 0 on."
        )
    return named


def _scaled(transform: Transform, keys: CachedKeys) -> Transform:
    """The transform of keys whose entries are multiplied by factors as well."""
    each = keys.factors.repeat(transform.mean.shape[-1] // len(keys.factors)).to(transform.mean)
    assert transform.metric is not None
    metric = transform.metric / (each[:, None] * each)
    return replace(transform, mean=transform.mean * each, basis=transform.basis * each[:, None], metric=metric)


def _without_full_mask(batch: Any) -> Any:
    """The batch without an attention mask that hides nothing: a model's own mask comes before any other."""
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(given, Tensor) or not bool((given == 1).all()):
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def _stored(batch: Any, keep_first: int) -> Tensor:
    """The tokens of a batch that a cache does not keep exact for ever, ``[batch, tokens]``."""
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch if isinstance(batch, Mapping) else {}
    given = named.get("input_ids", named.get("inputs_embeds"))
    if not isinstance(given, Tensor) or given.ndim < 2:
        raise LowRankError(
            f"calibrate_kv: got a batch of type {type(batch).__name__}, expected token ids, [batch, tokens], or a dict"
            " with input_ids."
        )
    real = named.get("attention_mask", given.new_ones(given.shape[:2])) != 0
    return real & (real.cumsum(1) > keep_first)
