"""transformers' ``Conv1D``, told by its name, since transformers is an extra."""

from __future__ import annotations

from torch import nn


def is_conv1d_class(cls: type[nn.Module]) -> bool:
    """Whether this very class is transformers' ``Conv1D``, a linear layer whose weight is stored as ``[in, out]``."""
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
