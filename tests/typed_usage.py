"""What a type checker sees of the public names; `make type` reads this file, nothing runs it.

mypy fails on an ``ignore`` that hides no error, so the last lines assert that misspelled names are found.
"""

import torch
from typing_extensions import assert_type

import lowrank_layers as lr
from lowrank_layers.layers import LowRankLinear


def usage(rank: lr.Rank = 2) -> None:
    """Types of what the package returns."""
    layer: lr.LowRankLinear = LowRankLinear(4, 4, rank=rank)
    assert_type(layer.rank, int)
    assert_type(lr.svd(torch.eye(3)), lr.SVD)
    assert_type(lr.LowRankCommState(rank=4), lr.LowRankCommState)
    assert_type(lr.LowRankCache(rank=4).get_seq_length(), int)
    lr.LowRankLinnear  # type: ignore[attr-defined]  # noqa: B018
    lr.kv_cache.LowRankKash  # type: ignore[attr-defined]  # noqa: B018
