"""Choosing between the adapters of a model: for good, inside a context, or per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LowRankError
from .attach import banks, check_name
from .learning import learned
from .merge import unmerged
from .module_copies import copies_of, trained_whole_by


def use_adapter(model: nn.Module, name: str | Iterable[str] | None) -> nn.Module:
    """Chooses which adapters are in use, in place. Only those learn: the gradients of the others are ``None``.

    The choice is part of the state dict. Frozen adapters (``model.requires_grad_(False)``) are switched without
    recompiling anything; where they learn, a compiled model compiles once for each set of adapters in use. Call
    ``backward`` before switching: a parameter that no longer learns takes no gradient.

    Args:
        model: an adapted model.
        name: name of one adapter, or names of several, which add up; ``None`` is none of them.

    Returns:
        The model.

    Raises:
        LowRankError: for an unknown name, or if adapters are merged and this would choose others.

    Examples:
        >>> model = lr.add_lora_(lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2, name="a"), rank=2, name="b")
        >>> len(lr.lora_parameters(model)), len(lr.lora_parameters(lr.use_adapter(model, "b")))
        (4, 2)
    """
    wanted = [] if name is None else [name] if isinstance(name, str) else list(name)
    for each in wanted:
        check_name(model, each)
    adapters = [(own, adapter) for bank in banks(model) for own, adapter in zip(bank.names, bank, strict=True)]
    if any(adapter.in_use != (own in wanted) for own, adapter in adapters):
        check_unmerged(model, "use_adapter")
    shared = trained_whole_by(model, wanted)
    if shared is not None:
        raise LowRankError(
            f"use_adapter: {shared[0]!r} is trained whole by each of the adapters {shared[1]}, and only one of these"
            " copies can be used; choose one of the adapters."
        )
    for copies in copies_of(model).values():
        copies.choose(wanted)
    for own, adapter in adapters:
        adapter.use_(own in wanted)
    return model


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Turns all adapters off inside the context, so that the model is exactly its base.

    Merged adapters are unmerged meanwhile, and merged again afterwards.

    With activation checkpointing, call ``backward`` inside as well: what is computed again has to be the same.

    Args:
        model: the model with adapters.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> x = torch.randn(2, 8)
        >>> base = model(x)
        >>> with lr.lora_disabled(lr.add_lora_(model, rank=2, init="pissa")):
        ...     torch.equal(model(x), base)
        True
    """
    adapters = [adapter for bank in banks(model) for adapter in bank if adapter.withheld is None]
    with unmerged(model), ExitStack() as after:
        for bank in banks(model):
            _set_until(after, bank, "rows", None)
        for copies in copies_of(model).values():
            _set_until(after, copies, "disabled", True)
        for adapter in adapters:
            after.callback(adapter.restore_)
            adapter.withhold_()
        yield model


@contextmanager
def lora_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Gives every sample of a batch its own adapter inside the context, whichever adapters are in use.

    Linear layers, convolutions and embeddings; a weight that is read as a whole (attention, recurrent, DoRA) refuses.
    It can be trained: those adapters learn that are in use, so name all of them in :func:`use_adapter` before. With
    activation checkpointing, call ``backward`` inside as well. Inside :func:`lora_disabled` every sample has the base.

    Args:
        model: an adapted model.
        names: one name per sample of the first dimension; ``None`` is the base.

    Raises:
        LowRankError: for an unknown name, or if the adapters are merged; in the forward pass if there are more or fewer
            samples than names.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2, name="a", init="olora")
        >>> with lr.lora_rows(model, ["a", None, "a"]):
        ...     model(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """
    if isinstance(names, str):
        raise LowRankError(f"lora_rows: got the names {names!r}, expected a list of one name per sample.")
    for each in {n for n in names if n is not None}:
        check_name(model, each)
    check_unmerged(model, "lora_rows")
    with ExitStack() as after:
        for bank in banks(model):
            if not bank.disabled:
                own, device = bank.names, bank.gates.device
                rows = torch.tensor([[float(n == each) for each in own] for n in names], device=device)
                _set_until(after, bank, "rows", rows)
        for copies in copies_of(model).values():
            _set_until(after, copies, "rows", list(names))
        yield model


def lora_parameters(
    model: nn.Module, name: str | None = None, *, lr: float | None = None, ratio: float = 16.0
) -> list[Any]:
    """Returns the parameters to train: those of all adapters in use, or of one adapter.

    With ``lr`` they come as optimizer groups in which ``B`` learns ``ratio`` times as fast as ``A`` (LoRA+; Hayou et
    al., 2024).

    Args:
        model: an adapted model.
        name: name of one adapter, whose parameters are returned whether it is in use or not; ``None`` is all in use.
        lr: learning rate of ``A``; ``None`` returns a plain list of parameters.
        ratio: learning rate of ``B`` divided by that of ``A``.

    Raises:
        LowRankError: for an unknown name.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> groups = lr.lora_parameters(model, lr=1e-4)
        >>> [group["lr"] for group in groups]
        [0.0001, 0.0016]
    """
    if name is not None:
        check_name(model, name)
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for copies in copies_of(model).values():
        for own, copied in copies.items():
            if own == (copies.active if name is None else name):
                slow += learned(copied).values()
    for bank in banks(model):
        for own, adapter in zip(bank.names, bank, strict=True):
            if name == own or (name is None and adapter.in_use):
                for key, parameter in learned(adapter).items():
                    (fast if key == "B" else slow).append(parameter)
    slow = list(dict.fromkeys(slow))  # tied layers share their rows
    if lr is None:
        return slow + fast
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def _set_until(after: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute until the context ends."""
    after.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def check_unmerged(model: nn.Module, who: str) -> None:
    """Raises if adapters are merged, so that none can be chosen."""
    if any(bank.merged is not None for bank in banks(model)):
        raise LowRankError(f"{who}: the adapters are merged into the weights; call unmerge_lora_(model) first.")
