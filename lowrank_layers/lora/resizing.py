"""Refusing to resize embeddings that an adapter changes: transformers would drop the adapter, or make it permanent."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..errors import LowRankError

_RESIZE = "resize_token_embeddings"


def mind_resizing_(model: nn.Module) -> None:
    """Makes transformers' models with a changed embedding or head refuse to resize them, and others not."""
    for module in model.modules():
        if not callable(getattr(type(module), _RESIZE, None)):
            continue
        ends: list[Any] = [getattr(module, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
        changed = any(".lora_" in f".{name}." for end in ends if end is not None for name, _ in end.named_modules())
        if changed:
            module.__dict__[_RESIZE] = _refuse
        elif module.__dict__.get(_RESIZE) is _refuse:
            del module.__dict__[_RESIZE]


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise LowRankError(
        "resize_token_embeddings: the embedding or the head has adapters, which have no rows for new tokens. Resize"
        " before adapters are added; or save this one, call remove_lora_(model), or remove_lora_(model, keep='merged')"
        " to keep what was learned, and add new ones after resizing."
    )
