"""Rows, variants and helpers for the checks of factored layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .tables import LAYERS, LayerRow

TIGHT = 1e-5
"""Relative error in fp32 of what is exact in exact arithmetic."""

rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)


def with_variants(keep: Callable[[LayerRow, str], bool] = lambda row, variant: True) -> pytest.MarkDecorator:
    """Parametrizes a test with those rows and variants that it can ask."""
    pairs = [(row, variant) for row in LAYERS for variant in row.variants if keep(row, variant)]
    return pytest.mark.parametrize(("row", "variant"), pairs, ids=[f"{row.name}-{variant}" for row, variant in pairs])


rows_and_variants = with_variants()

no_padding_warning = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
"""torch warns that it copies the input for such kernels."""

SETTINGS = [
    *("in_features", "out_features"),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
]


def settings_of(module: nn.Module) -> dict:
    return {name: getattr(module, name) for name in SETTINGS if hasattr(module, name)}


def converted(row: LayerRow, variant: str = "plain", rank=None, **more) -> tuple[nn.Module, lr.FactoredModule]:
    """A dense layer and its low-rank form, at the small rank unless told."""
    dense = row.dense(variant, **more)
    return dense, row.from_dense(dense, rank=row.small if rank is None else rank)


def unfolded(row: LayerRow, weight: torch.Tensor) -> torch.Tensor:
    """The weight as ``factors()`` sees it."""
    return weight if row.matrix is None else row.matrix(weight)
