"""Replacing layers of a model, with everything that has to follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import LowRankError
from ..layers import PROJECTIONS, LowRankMultiheadAttention
from .attention import openable_attentions, put_
from .optimizer import remap_optimizer_, successions
from .shortcuts import update_shortcuts_


def replace_(
    model: nn.Module, replacements: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Puts modules in the place of others, in place, and keeps everything that depends on them in step.

    A new module stands under all the names of the old one. An ``nn.MultiheadAttention`` is opened for good where one of
    its projections is replaced. torch's fast paths and transformers' ``resize_token_embeddings`` are switched as the
    new layers need it, and the optimizer holds the new parameters, with the state that is still valid.

    Args:
        model: changed in place.
        replacements: the new modules, by a name of the old one; ``"attention.q_proj"`` is a projection of an
            ``nn.MultiheadAttention``.
        optimizer: the optimizer of the model, changed in place.

    Raises:
        LowRankError: if a name is unknown or the model's own, or an attention cannot be opened; nothing is changed
            then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside: dict[str, dict[str, nn.Module]] = {}  # by attention and projection
    for name, new in replacements.items():
        parent, _, child = name.rpartition(".")
        if child in PROJECTIONS and isinstance(modules.get(parent), nn.MultiheadAttention):
            inside.setdefault(parent, {})[child] = new
        elif name == "":
            raise LowRankError(
                f"the model itself is the {type(model).__name__} to replace, which cannot be done in place;"
                " wrap it in nn.Sequential, or use from_dense."
            )
        elif name not in modules:
            raise LowRankError(f"the model has no module {name!r}.")
    openable = set(openable_attentions(model).values()) if inside else set()
    for name in inside:
        if modules[name] not in openable:
            raise LowRankError(f"{name!r}: the attention cannot be opened, and reads the weights of its layers itself.")
    opened = {name: LowRankMultiheadAttention.from_dense(modules[name], rank=None) for name in inside}
    if opened:
        replace_(model, opened, optimizer)
    olds = [model.get_submodule(name) for name in replacements]
    put_(model, replacements)
    update_shortcuts_(model)
    if optimizer is not None:
        pairs = zip(olds, replacements.values(), strict=True)
        remap_optimizer_(optimizer, [each for old, new in pairs for each in successions(old, new)])
