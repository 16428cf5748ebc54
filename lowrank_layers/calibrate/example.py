"""One sample out of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_sample(batch: Any, samples: int) -> Any:
    """Returns a batch of the first sample alone, copied; what does not have one entry per sample stays as it is.

    Args:
        batch: a tensor, or a tuple, list or dict that holds some.
        samples: number of samples in the batch.
    """
    if isinstance(batch, Tensor):
        return batch[:1].detach().clone() if batch.ndim and len(batch) == samples else batch.detach().clone()
    if isinstance(batch, Mapping):
        return {name: first_sample(value, samples) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(first_sample(value, samples) for value in batch)
    return batch
