"""tensorly-torch as a peer: where it is installed, its own answer stands beside ours."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
from torch import nn

import lowrank_layers as lr

CONVS = [lr.LowRankConv2d, lr.TuckerConv2d, lr.CPConv2d]
convs = pytest.mark.parametrize("cls", CONVS, ids=lambda cls: cls.__name__)

peer_warnings = pytest.mark.filterwarnings(
    "ignore:Given only one int for 'rank'", "ignore:Trying to compute SVD with n_eigenvecs"
)
"""tensorly says so of ranks that it is given here on purpose."""

MORE = 10_000
"""Above every rank that the layers of this file have."""

TIGHT = 1e-5


def full(cls: type[lr.FactoredModule], dense: nn.Module) -> lr.FactoredModule:
    return cls.from_dense(dense, rank=MORE)


def tensorly_torch() -> ModuleType | None:
    """The peer, where it and tensorly, which it does not declare, are installed."""
    if not all(importlib.util.find_spec(name) for name in ("tensorly", "tltorch")):
        return None
    return importlib.import_module("tltorch")


def peer_conv(tltorch: ModuleType, conv: nn.Module, **kwargs) -> nn.Module:
    """Its conversion at full Tucker rank, unless told."""
    settings = {"factorization": "tucker", "rank": tuple(conv.weight.shape), **kwargs}
    return tltorch.FactorizedConv.from_conv(conv, **settings)
