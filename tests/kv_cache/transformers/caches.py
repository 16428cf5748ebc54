"""Caches and prompts that the tests of LowRankCache share."""

import pytest
import torch

import lowrank_layers as lr

IDS = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(1))
KEEP = {"keep_recent": 6, "keep_first": 2, "block": 4}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["lowrank", "sdpa"])
WARNINGS = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:LowRankCache. this attention needs whole keys"),
]
"""Any other implementation than "lowrank" is warned of once, which is tested by itself."""


def exact(**changes):
    """A cache whose coefficients hold everything."""
    return lr.LowRankCache(**{"rank": 16, **KEEP, **changes})


def compressed(cache):
    """Whether a layer has coefficients, so that a test looked at some."""
    return any(getattr(layer, "compressed", 0) > 0 for layer in cache.layers)


def through_a_file(cache, folder):
    """The cache saved and loaded."""
    cache.save(folder / "cache.safetensors")
    return lr.LowRankCache.load(folder / "cache.safetensors")
