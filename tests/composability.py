"""Whole models and layers for the tests that ask whether the rest of torch takes factored layers."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .contracts.tables import relative
from .whole_models import MODELS, is_pure, loss_of, rows_and_variants

TIGHT = 1e-5
"""Relative error in fp32 of what is exact in exact arithmetic."""

models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
pure_layers = pytest.mark.parametrize(
    ("row", "variant"),
    [pytest.param(row, variant, id=f"{row.name}-{variant}") for row, variant in rows_and_variants(is_pure)],
)


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], bound: float = TIGHT) -> None:
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert relative(a, b) < bound, k


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(model, inputs), list(model.parameters()))


def factored(model: nn.Module) -> list[lr.FactoredModule]:
    return [module for module in model.modules() if isinstance(module, lr.FactoredModule)]


def state_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
