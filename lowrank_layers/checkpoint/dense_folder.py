"""Whether a folder of transformers holds a dense model."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import CheckpointError
from ..modules import QUANT_METHOD


def check_is_dense(folder: Path) -> None:
    """Raises if a folder's ``config.json`` describes low-rank layers, or layers of other sizes than the model's own.

    Args:
        folder: a folder, or a file, which has no description.

    Raises:
        CheckpointError: if the model is compressed.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == QUANT_METHOD or "low_rank_layers" in config:
        raise CheckpointError(
            f"{folder}: holds a model that is compressed already, expected a dense one; compress the dense model to the"
            " whole budget, or read this one with from_pretrained, and use make_plan and factorize_."
        )
