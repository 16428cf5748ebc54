"""Calibration of torch's transformer layers sees every projection and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

from ..contracts.tables import relative
from .transformer_rows import (
    HEADS,
    SIZE,
    assert_untouched,
    nested_tensor_warnings,
)

pytestmark = nested_tensor_warnings


class Classifier(nn.Module):
    """An encoder with a head, on sequences whose entries lie near a few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return out


def sequences(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.3, 0.1, 0.1, 0.05, 0.05])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    return (torch.randn(count, 6, 8, generator=generator) * scales) @ turn


@pytest.mark.parametrize("budget", [0.4, 0.6])
def test_calibration_lowers_the_error_at_the_same_budget(budget):
    torch.manual_seed(1)
    model = Classifier().eval()
    batches, held_out = list(sequences(256, 1).split(64)), sequences(256, 2)
    expected = model(held_out)
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plain = copy.deepcopy(model)
    lr.factorize_(plain, lr.make_plan(plain, lr.Budget(params=budget)))
    plan = lr.make_plan(model, lr.Budget(params=budget), stats=stats)
    assert plan.after.params <= budget * plan.total.params
    weighted = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    lr.factorize_(model, plan, stats=stats, data=batches)
    errors = [relative(module(held_out), expected) for module in (plain, weighted, model)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[0]
    assert errors[2] < 1.05 * errors[1]


def test_the_statistics_of_every_projection_are_those_of_its_inputs():
    model = Classifier().eval()
    x = sequences(32, 1)
    stats = lr.calibrate(model, [x])
    first = model.encoder.layers[0]
    inside = model.embed(x).detach()
    expected = inside.flatten(0, 1).double()
    for part in ("q_proj", "k_proj", "v_proj"):
        moments = stats[f"encoder.layers.0.self_attn.{part}"].inputs
        assert torch.allclose(moments.mean.double().flatten(), expected.mean(0), atol=1e-4)
    attended = inside + first.self_attn(inside, inside, inside)[0].detach()
    expected = first.norm1(attended).detach().flatten(0, 1).double()
    moments = stats["encoder.layers.0.linear1"].inputs
    assert torch.allclose(moments.mean.double().flatten(), expected.mean(0), atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_calibrating_and_planning_leave_the_model_as_it_was(training):
    model = Classifier().train(training)
    model.encoder.layers[1].eval()
    flags = [module.training for module in model.modules()]
    model.head.weight.requires_grad_(False)
    learns = [p.requires_grad for p in model.parameters()]
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    parameters = list(model.parameters())
    stats = lr.calibrate(model, [sequences(8, 1)], loss=lr.SampledCrossEntropy())
    lr.make_plan(model, lr.Budget(macs=0.5), stats=stats)
    with pytest.raises(lr.BudgetError):
        lr.make_plan(model, lr.Budget(params=0.001))
    assert_untouched(model, before, modules)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong", ["shape", "iterator", "kind", "not finite"])
@pytest.mark.parametrize("loss", [None, lr.SampledCrossEntropy()], ids=["no loss", "loss"])
def test_a_batch_that_raises_in_the_middle_changes_nothing(wrong, loss):
    model = Classifier().train()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    flags = {key: value for module in model.modules() for key, value in vars(module).items() if "nested" in key}

    def batches() -> Any:
        yield sequences(8, 1)
        if wrong == "iterator":
            raise ValueError("the disk is full")
        yield {
            "shape": torch.randn(2, 6, 9),
            "kind": 3,
            "not finite": torch.full((2, 6, 8), float("nan")),
        }[wrong]

    with pytest.raises((ValueError, RuntimeError, lr.LowRankError)):
        lr.calibrate(model, batches(), loss=loss)
    assert_untouched(model, before, modules)
    assert all(module.training for module in model.modules())
    assert {k: v for module in model.modules() for k, v in vars(module).items() if "nested" in k} == flags
    plan = lr.make_plan(model, rank=2)
    with pytest.raises((ValueError, RuntimeError, lr.LowRankError)):
        lr.factorize_(model, plan, data=batches())
    assert_untouched(model, before, modules)
    assert all(module.training for module in model.modules())


def test_an_interrupted_calibration_context_closes_the_attentions():
    model = Classifier()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())

    def interrupted() -> None:
        with lr.Calibration(model):
            assert isinstance(model.encoder.layers[0].self_attn, lr.LowRankMultiheadAttention)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_untouched(model, before, modules)
