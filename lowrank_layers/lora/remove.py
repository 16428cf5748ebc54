"""``remove_lora_``: taking adapters off a model, with or without what they learned."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..errors import LowRankError
from .attach import check_name, strip_
from .merge import merge_lora_, unmerged

Keep = Literal["base", "merged"]


def remove_lora_(model: nn.Module, name: str | None = None, *, keep: Keep = "base") -> nn.Module:
    """Takes adapters off, in place: classes, keys and ``requires_grad`` are then as before the first one.

    Args:
        model: an adapted model.
        name: name of the adapter to take off; ``None`` takes off all of them. Merged adapters are unmerged first, and
            those that stay are merged again.
        keep: ``"base"`` leaves the base weights, ``"merged"`` the base weights with all adapters that are in use added
            to them, as ``merge_lora_(model, unload=True)`` does; that takes off all adapters, so that no name can be
            given.

    Returns:
        The model.

    Raises:
        LowRankError: if there is no adapter of that name, or for ``keep="merged"`` if the adapters cannot be merged.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> type(lr.remove_lora_(model)[0]), list(model.state_dict())
        (<class 'torch.nn.modules.linear.Linear'>, ['0.weight', '0.bias'])
    """
    if keep not in ("base", "merged"):
        raise LowRankError(f"remove_lora_: got keep={keep!r}, expected 'base' or 'merged'.")
    if name is not None:
        check_name(model, name)
    if keep == "merged":
        if name is not None:
            raise LowRankError(
                f"remove_lora_: got the name {name!r} with keep='merged', which takes off all adapters; leave the name"
                " out, and choose what is merged with use_adapter."
            )
        return merge_lora_(model, unload=True)
    with unmerged(model):
        strip_(model, name)
    return model
