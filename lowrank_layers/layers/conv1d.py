"""transformers' ``Conv1D``, recognized by name, since transformers is an optional dependency."""

from __future__ import annotations

from torch import nn


def is_conv1d_class(cls: type[nn.Module]) -> bool:
    """Returns whether a class is transformers' ``Conv1D``, a linear layer whose weight is stored as ``[in, out]``."""
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
