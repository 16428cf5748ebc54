"""transformers' ``resize_token_embeddings`` for low-rank and adapted embeddings and heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn

from ..errors import LowRankError

_METHOD = "resize_token_embeddings"
Restore = Callable[[nn.Module], nn.Module]
"""A function from the resized plain layer to the low-rank or adapted one that belongs in its place."""


@runtime_checkable
class Resizable(Protocol):
    """An embedding or a head around a plain one, which transformers can resize."""

    def lift_(self) -> tuple[nn.Module, Restore]:
        """Returns the plain layer with the vocabulary's rows, and what puts the rest around it once it is resized."""


def update_resizing_(module: nn.Module) -> None:
    """Lets a transformers model resize its embedding and head where they are low-rank or adapted.

    The model is given a ``resize_token_embeddings`` of its own that puts plain layers in their place meanwhile: that of
    transformers would leave an adapter behind, or take a product of factors for a weight. Other modules, and models
    without such layers, keep what they have.
    """
    if not hasattr(type(module), _METHOD):
        return
    ends = _ends(module)
    special = any(map(_is_special, (*ends.values(), *_tied_to(module, ends).values())))
    own = vars(module).get(_METHOD)
    if special and own is None:
        module.__dict__[_METHOD] = partial(_resize, module)
    elif not special and getattr(own, "func", None) is _resize:
        del module.__dict__[_METHOD]


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> nn.Module:
    """Runs transformers' method while plain layers stand in the place of low-rank and adapted ones."""
    restores: dict[str, Restore] = {}
    ends = _ends(model)
    for name, module in _tied_to(model, ends).items():
        if any(map(_is_special, (module, *ends.values()))):
            raise LowRankError(
                f"resize_token_embeddings: {name!r} is a module of its own with the weight of the embedding, which"
                " transformers replaces by the embedding, with or without its adapters; resize the model before"
                " add_lora_, or call remove_lora_ first. Nothing is changed."
            )
    try:
        for name, end in ends.items():
            if _is_special(end):
                _check_ties(model, end)
                plain, restores[name] = _lifted(end)
                getattr(model, f"set_{name}")(plain)
        getattr(type(model), _METHOD)(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    finally:
        resized = {name: getattr(model, f"get_{name}")() for name in restores}
        for name, restore in restores.items():
            getattr(model, f"set_{name}")(restore(resized[name]))
    return cast(nn.Module, model.get_input_embeddings())


def _ends(model: Any) -> dict[str, nn.Module]:
    """Returns the input embedding and the head, as far as the model has them."""
    found = {}
    for name in ("input_embeddings", "output_embeddings"):
        try:
            end = getattr(model, f"get_{name}")()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(end, nn.Module):
            found[name] = end
    return found


def _tied_to(model: nn.Module, ends: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the other modules that hold a parameter of the embedding or the head, by name."""
    shared = {id(parameter) for end in ends.values() for parameter in end.parameters(recurse=False)}
    return {
        name: module
        for name, module in model.named_modules()
        if all(module is not end for end in ends.values())
        and any(id(parameter) in shared for parameter in module.parameters(recurse=False))
    }


def _is_special(end: nn.Module) -> bool:
    """Whether the embedding or head is low-rank or adapted, so that transformers cannot resize it."""
    return isinstance(end, Resizable) or hasattr(end, "to_dense") or hasattr(end, "_plain_class")


def _lifted(end: nn.Module) -> tuple[nn.Module, Restore]:
    """Returns the innermost plain layer; an adapted low-rank layer is two layers around it."""
    if not isinstance(end, Resizable):
        if _is_special(end):
            raise LowRankError(
                f"resize_token_embeddings: got a {type(end).__name__}, which cannot be resized; resize the model before"
                " it is factorized or adapted, or make the layer plain first (densify_, remove_lora_). Nothing is"
                " changed."
            )
        return end, lambda resized: resized

    plain, restore = end.lift_()
    try:
        inner, restore_inner = _lifted(plain)
    except LowRankError:
        restore(plain)
        raise
    return inner, lambda resized: restore(restore_inner(resized))


def _check_ties(model: Any, end: nn.Module) -> None:
    """Raises for a product of factors in a model whose configuration ties the head to the embedding."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if hasattr(end, "to_dense") and getattr(config, "tie_word_embeddings", False):
        raise LowRankError(
            f"resize_token_embeddings: the configuration ties the head to the embedding, and a {type(end).__name__} has"
            " no weight that can be tied; set config.tie_word_embeddings = False first. Nothing is changed."
        )
