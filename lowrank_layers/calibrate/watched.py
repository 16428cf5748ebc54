"""Which layers calibration watches, and what it counts of a pass besides their moments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ConvNd, LowRankTransposedLinear, is_derived, is_embedding, is_factored, layer_cost
from ..modules import Selector, select, walk_layers
from .layer_recorder import as_batch
from .padding import Padding
from .run import layer_input

CALIBRATED = (nn.Linear, ConvNd, nn.Embedding, nn.EmbeddingBag)
"""Layers whose moments are taken; so are those of transformers' ``Conv1D``."""


def watched_layers(
    model: nn.Module, target: Iterable[Selector] | None, closed: Iterable[tuple[str, nn.Module]]
) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """Returns the layers whose moments are taken, by name, and those of which only MACs are counted.

    Args:
        model: the model, its attentions opened.
        target: which layers' moments are taken; ``None`` takes all.
        closed: the layers of the model before its attentions were opened.
    """
    taken = None if target is None else select(model, target, "target", closed)
    layers: dict[str, nn.Module] = {}
    others: list[nn.Module] = []
    for name, module in walk_layers(model):
        if is_calibrated(module) and (taken is None or name in taken):
            layers[name] = module
        elif isinstance(module, (nn.Linear, ConvNd)) and not is_factored(module):
            others.append(module)
    return layers, others


def count_samples(padding: Padding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Returns the number of samples that a model was called with.

    Args:
        padding: the masks of the pass.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
    """
    known = padding.samples()
    if known is not None:
        return known
    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return len(first) if first is not None and first.ndim else 1


@torch.no_grad()
def count_macs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], padding: Padding) -> float:
    """Returns the MACs of one call of a layer, without those of padding.

    Args:
        module: the layer.
        args: its positional arguments.
        kwargs: its keyword arguments.
        padding: the masks of the pass.
    """
    x = layer_input(args, kwargs)
    found = padding.of(module, x, as_batch(module, x))
    shape = tuple(x.shape[-1 - len(getattr(module, "kernel_size", ())) :])
    share = 1.0 if found is None else float(found.inputs.sum()) / found.inputs.numel()
    return share * layer_cost(module, shape).macs * (x.numel() // math.prod(shape))


def is_calibrated(module: nn.Module) -> bool:
    """Returns whether the moments of a module are taken.

    Args:
        module: the module.
    """
    known = isinstance(module, CALIBRATED) or LowRankTransposedLinear.stands_for(module)
    if is_embedding(module) and type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return False  # subclasses that compute positions take lengths and masks, not indices
    return known and not is_derived(module)
