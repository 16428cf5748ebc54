"""The model that a folder of transformers describes, without values."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import CheckpointError, MissingExtraError
from .dense_folder import check_is_dense
from .mapped_model import without_values


def transformers_model(folder: Path) -> nn.Module:
    """Builds the model that ``config.json`` names, with parameters on the meta device, in the dtype of the file.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: for a folder without ``config.json``, of a class that transformers does not have, or with a
            model that is compressed.
        MissingExtraError: if transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json of transformers, expected one, or model=, the model on the meta device."
        )
    check_is_dense(folder)
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(
            "compress_checkpoint: building the model of a folder needs transformers; pip install"
            " 'lowrank-layers[transformers]', or give model=."
        ) from None
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise CheckpointError(f"{folder}: its config.json names the classes {names}, which transformers does not have.")
    with without_values():
        model: nn.Module = kind(config)
    return model
