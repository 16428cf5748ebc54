"""Walking over a model: which modules it has, and under which names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn

from ..layers import is_factored


def walk_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module once, with its first name; the children of factored layers are left out."""
    inside: str | None = None  # the factored layer that the walk is in: its children come right after it
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        yield name, module
        inside = (f"{name}." if name else "") if is_factored(module) else None


def module_aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Returns all names of every module; one that is used in several places has several."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return dict(names)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
