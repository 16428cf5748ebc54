"""What a type checker sees of the public names; `make type` reads this file, nothing runs it.

mypy fails on an ``ignore`` that hides no error, so the last lines assert that misspelled names are found.
"""

import torch
from typing_extensions import assert_type

import lowrank_layers as lr
from lowrank_layers import (
    LowRankCache as LowRankCache,
    LowRankCommState as LowRankCommState,
    LowRankProjection as LowRankProjection,
)
from lowrank_layers.layers import LowRankLinear

rank: lr.Rank = lr.Energy(0.5)
layer: lr.LowRankLinear = LowRankLinear(4, 4, rank=2)
assert_type(lr.svd(torch.eye(3)), lr.SVD)
assert_type(lr.LowRankCache(rank=4).get_seq_length(), int)

misspelled = lr.LowRankLinnear  # type: ignore[attr-defined]
misspelled = lr.kv_cache.LowRankKash  # type: ignore[attr-defined]
