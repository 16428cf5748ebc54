"""Marking layers whose numbers of inputs or outputs are others than those that the model was built with."""

from __future__ import annotations

from torch import nn

RESIZED = "_resized"
"""The instance attribute that marks them; it stays with copies, and with low-rank and dense layers in their place."""


def mark_resized(layer: nn.Module) -> None:
    """Marks a layer, so that files describe its sizes."""
    vars(layer)[RESIZED] = True


def unmark_resized(layer: nn.Module) -> None:
    """Takes the mark off a layer whose sizes are those that the model would be built with."""
    vars(layer).pop(RESIZED, None)


def is_resized(layer: nn.Module) -> bool:
    """Returns whether a layer is marked."""
    return RESIZED in vars(layer)
