"""The configuration of a model of transformers, for a model whose hidden layers have become smaller."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NAMES = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim")
"""What transformers calls the number of hidden units of a perceptron."""


def adopt_config_(model: nn.Module, sizes: Mapping[int, int]) -> bool:
    """Gives the configuration of a model the numbers of hidden units that it has now, if that describes the model.

    Args:
        model: the model; what has no configuration stays as it is.
        sizes: the new number by the old one.

    Returns:
        Whether the model has the shapes that its class builds from the configuration.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return False
    changed = copy.deepcopy(config)
    _change(changed, sizes)
    try:
        with torch.device("meta"):
            built = type(model)(changed)
    except Exception:  # a class that takes more than a configuration
        return False
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, built)]
    if shapes[0] != shapes[1]:
        return False
    _change(config, sizes)
    return True


def _change(config: Any, sizes: Mapping[int, int]) -> None:
    """Changes the sizes in a configuration and those in it, such as that of a text model."""
    for name, value in list(vars(config).items()):
        if name in NAMES and value in sizes:
            setattr(config, name, sizes[value])
        elif hasattr(value, "to_dict"):
            _change(value, sizes)
