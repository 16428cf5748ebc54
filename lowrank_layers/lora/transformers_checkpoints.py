"""Adapters in the checkpoints of transformers' Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..trainer_callbacks import hf_callback
from .attach import choose_name
from .peft.save import save_lora

FOLDER = "adapter"


def lora_checkpoints(model: nn.Module, name: str | None = None) -> Any:
    """Returns a callback for transformers' ``Trainer`` that writes an adapter into the folder of every checkpoint.

    It writes what :func:`save_lora` writes, into ``adapter``. What else ``Trainer`` writes stays, so that training
    is resumed as usual: from the base model with the adapter added.

    Args:
        model: the adapted model that is trained.
        name: name of the adapter; may be left out where there is one only.

    Raises:
        MissingExtraError: if transformers is not installed.
        UnsupportedLayerError: as :func:`save_lora`, before the training.
        LowRankError: for an unknown name.

    Examples:
        >>> model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> callback = lr.lora_checkpoints(model)  # transformers.Trainer(model, ..., callbacks=[callback])
    """
    name = choose_name(model, name, "lora_checkpoints")
    with tempfile.TemporaryDirectory() as folder:
        save_lora(model, folder, name)

    def save(checkpoint: Path) -> None:
        save_lora(model, checkpoint / FOLDER, name)

    return hf_callback(save=save)
