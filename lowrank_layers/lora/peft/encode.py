"""Adapters as PEFT's settings and tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapted_weight import base_modules
from ..adapter import Adapter
from ..mixed_groups import dora_ratio
from .config import NOTHING, Config
from .keys import PeftWeight
from .tensors import encode, file_shapes, groups_of


def encoded(found: Mapping[PeftWeight, Adapter]) -> tuple[Config, dict[str, Tensor]]:
    """The settings and the tensors of all adapters; the targets are those of :func:`target_settings`."""
    by_label: dict[str, list[tuple[PeftWeight, Adapter]]] = defaultdict(list)
    for each, adapter in found.items():
        by_label[each.label].append((each, adapter))
    with_bias = any(adapter.bias is not None for adapter in found.values())
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for label, group in by_label.items():
        coded = [encode(each.weight, adapter) for each, adapter in group]
        ranks[label] = max(rank for _, _, rank in coded)
        scaling = next((s for _, adapter in group if (s := float(adapter.scaling))), 1.0)
        alphas[label] = _tidy(scaling * ranks[label])
        for (each, adapter), (a, b, rank) in zip(group, coded, strict=True):
            if len(group) > 1:  # the two projections of an attention share rank and scaling
                a = torch.cat([a, a.new_zeros(ranks[label] - rank, a.shape[1])])
                b = torch.cat([b, b.new_zeros(b.shape[0], ranks[label] - rank)], 1)
            own = float(adapter.scaling)
            tensors[each.keys["a"]] = a
            tensors[each.keys["b"]] = b if own == scaling else b * (own / scaling)
            shapes = file_shapes(each.weight, ranks[label])
            if adapter.magnitude is not None:
                magnitude = adapter.magnitude.detach()
                groups = groups_of(each.weight.layout)
                if groups > 1:
                    magnitude = magnitude / dora_ratio(each.weight.base, a, b, own, groups)
                tensors[each.keys["magnitude"]] = magnitude.reshape(shapes["magnitude"])
            if with_bias:  # PEFT scales it too
                bias = b.new_zeros(shapes["bias"]) if adapter.bias is None else adapter.bias.detach() / scaling
                tensors[each.keys["bias"]] = bias
    if not found:
        return Config(), {}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = Config(
        r=r,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(label)}": rank for label, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(label)}": value for label, value in alphas.items() if value != alpha},
        use_dora=any(adapter.magnitude is not None for adapter in found.values()),
        lora_bias=with_bias,
        lora_dropout=max(adapter.dropout for adapter in found.values()),
    )
    return config, tensors


def _tidy(value: float) -> float:
    return round(value) if abs(value - round(value)) <= 1e-6 * max(1.0, abs(value)) else value


def target_settings(model: nn.Module, weights: Iterable[PeftWeight]) -> tuple[list[str] | str, list[str] | None]:
    """``target_modules`` and ``target_parameters``, which select just these weights.

    The modules are a list of names, or a regular expression where a name of the list ends other names too.
    """
    own = list(weights)
    parameters = sorted(each.label for each in own if each.label == each.weight.name)
    labels = sorted({each.label for each in own} - set(parameters))
    taken = {name for name in base_modules(model) if any(name == each or name.endswith(f".{each}") for each in labels)}
    if not own:
        return NOTHING, None
    return labels if taken == set(labels) else "|".join(map(re.escape, labels)), parameters or None
