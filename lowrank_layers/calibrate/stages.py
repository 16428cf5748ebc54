"""The parts of a model that are worked on one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import LowRankError
from ..layers import ConvNd, LowRankMultiheadAttention, LowRankTransposedLinear, is_factored
from ..modules import Selector, select

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules whose items are stages."""
LAYERS = (nn.Linear, ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, LowRankMultiheadAttention)
"""Modules that are opened no further."""


def find_stages(model: nn.Module, stages: Iterable[Selector] | None = None) -> list[str]:
    """Returns the names of the stages of a model, in the order of its modules; every layer lies in one of them.

    A stage is a module of a class that the model lists in ``_no_split_modules``, as those of transformers do, or an
    item of a ``Sequential``, ``ModuleList`` or ``ModuleDict``: a transformer block, a residual block. Items that are
    such containers themselves, or hold one with several items that have layers, are opened further. A layer outside
    of them, such as an embedding or a head, is a stage of its own.

    Args:
        model: the model.
        stages: the stages in place of those that are found: names of modules, ends of them, names of modules around
            them, types, or predicates ``(name, module) -> bool``.

    Raises:
        LowRankError: for a selector that matches nothing, and a model without layers.

    Examples:
        >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
        >>> find_stages(nn.Sequential(nn.Linear(4, 8), *blocks))
        ['0', '1.0', '2.0']
        >>> block = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> find_stages(nn.TransformerEncoder(block, num_layers=2))
        ['layers.0', 'layers.1']
    """
    chosen = None if stages is None else select(model, stages, "stages")
    unsplit = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found: dict[nn.Module, str] = {}

    def visit(name: str, module: nn.Module, is_item: bool) -> None:
        if module in found or not _has_layers(module):
            return
        is_stage = type(module).__name__ in unsplit or (is_item and not _is_opened(module))
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and (
            _is_layer(module) or (is_stage if chosen is None else name in chosen)
        ):
            found[module] = name
            return
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child, isinstance(module, CONTAINERS))

    visit("", model, False)
    if not found:
        raise LowRankError("stages: got a model without linear layers, convolutions and embeddings.")
    return list(found.values())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) or LowRankTransposedLinear.stands_for(module) or is_factored(module)


def _has_layers(module: nn.Module) -> bool:
    return any(map(_is_layer, module.modules()))


def _is_opened(item: nn.Module) -> bool:
    """Whether an item is a container, or holds one with several items that have layers."""
    inner = [module for module in item.modules() if isinstance(module, CONTAINERS)]
    return isinstance(item, CONTAINERS) or any(sum(map(_has_layers, each.children())) > 1 for each in inner)
