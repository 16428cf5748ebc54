"""Opening modules that hide several matrices, so that each can be planned, calibrated and replaced on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers import FactoredModule, LowRankMultiheadAttention
from .resize_embeddings import mind_resizing_
from .tree import module_aliases, put_, reason_to_keep, walk_layers

_FAST_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    # in eval mode torch's layer reads the weights of its children and skips their forward, unless this says no
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_MEMORY = "_fast_path_of_dense"


def attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Every ``nn.MultiheadAttention`` below the model that can be opened.

    That is no subclass, none with a computed weight, a hook or a forward of its own, and none that shares a parameter
    with another module.
    """
    users: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].add(name)
    aliases = module_aliases(model)
    found = {}
    for name, module in walk_layers(model):
        if not name or type(module) is not nn.MultiheadAttention:
            continue
        own = {inside for alias in aliases[module] for inside in (alias, f"{alias}.out_proj")}
        shared = any(not users[id(parameter)] <= own for parameter in module.parameters())
        if not shared and all(reason_to_keep(part) is None for part in module.modules()):
            found[name] = module
    return found


@contextmanager
def unfused(model: nn.Module, only: Collection[str] | None = None) -> Iterator[None]:
    """Inside, every attention stands open: four ``nn.Linear`` that share its memory. Afterwards all is as it was.

    Args:
        model: changed in place, and back.
        only: names of the attentions to open; by default all that can be.
    """
    dense = {name: module for name, module in attentions(model).items() if only is None or name in only}
    put_(model, {name: LowRankMultiheadAttention.over(module) for name, module in dense.items()})
    mind_fast_paths_(model)
    try:
        yield
    finally:
        put_(model, dense)
        mind_fast_paths_(model)


def unfuse_(model: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, nn.Module]]:
    """Opens attentions for good; returns pairs of the old and the new module."""
    found = attentions(model)
    new = {name: LowRankMultiheadAttention.from_dense(found[name], rank=None) for name in names if name in found}
    put_(model, new)
    return [(found[name], module) for name, module in new.items()]


def fuse_(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Closes every open attention whose projections are all dense; returns pairs of the old and the new module."""
    opened = {
        name: module
        for name, module in walk_layers(model)
        if name and isinstance(module, LowRankMultiheadAttention) and not any(module.rank)
    }
    closed = {name: module.to_dense() for name, module in opened.items()}
    put_(model, closed)
    return [(opened[name], module) for name, module in closed.items()]


def unfused_names(model: nn.Module) -> list[str]:
    """The attentions that stand open."""
    return [name for name, module in walk_layers(model) if isinstance(module, LowRankMultiheadAttention)]


def mind_fast_paths_(model: nn.Module) -> None:
    """Switches torch's fast paths off where a layer below is low-rank, open or trained whole, else on again."""
    for module in model.modules():
        for kind, (flag, off) in _FAST_PATHS.items():
            if not isinstance(module, kind):
                continue
            factored = any(
                isinstance(m, (FactoredModule, LowRankMultiheadAttention)) or hasattr(m, "skipped_by_fast_paths")
                for m in module.modules()
            )
            if factored and _MEMORY not in module.__dict__:
                module.__dict__[_MEMORY] = getattr(module, flag)
                setattr(module, flag, off)
            elif not factored and _MEMORY in module.__dict__:
                setattr(module, flag, module.__dict__.pop(_MEMORY))
    mind_resizing_(model)
