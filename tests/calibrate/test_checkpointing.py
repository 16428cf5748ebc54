"""Activation checkpointing runs forward passes twice; calibration counts them once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # tokens and checkpoints

KINDS = {"plain": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


class Net(nn.Module):
    """Blocks in checkpoints, the first on the model's own input, a shared layer, and one with computed weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = KINDS[kind]
        self.embed = nn.Embedding(20, 8)
        self.first, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def block(self, x: Tensor) -> Tensor:
        return self.first(torch.relu(self.first(x))) + self.conv(x.mT).mT

    def forward(self, x: Tensor, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        def run(function, *args):
            return function(*args) if self.how is None else checkpoint(function, *args, **self.how)

        x = run(self.block, x) + run(self.embed, ids)
        x = run(self.block, run(self.normed, x))
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(run(lambda x: self.attention(x, src_key_padding_mask=padding), x))


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    mask = (torch.arange(6) < torch.tensor([[3], [6], [5], [1]])).long()
    return [
        {"x": torch.randn(4, 6, 8), "ids": torch.randint(20, (4, 6)), "attention_mask": mask},
        {"x": torch.randn(4, 6, 8), "ids": torch.randint(20, (4, 6))},
    ]


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_statistics_with_and_without_are_the_same(kind, batches):
    expected = lr.calibrate(Net("plain"), batches, lr.SampledCrossEntropy())
    stats = lr.calibrate(Net(kind), batches, lr.SampledCrossEntropy())
    assert stats.other_macs == expected.other_macs > 0
    assert list(stats) == list(expected)
    for name, want in expected.items():
        got = stats[name]
        assert (got.repeats, got.positions, got.inputs.rows) == (want.repeats, want.positions, want.inputs.rows), name
        assert torch.equal(got.inputs.second, want.inputs.second), name
        if name == "embed" and kind == "reentrant":
            assert got.gradients is None  # torch's reentrant checkpoints give none where no input has any
            continue
        assert torch.allclose(got.gradients, want.gradients, rtol=1e-5, atol=1e-12), name
    costs = [lr.make_plan(Net(k), rank=2, stats=s).total.macs for k, s in (("plain", expected), (kind, stats))]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_a_calibration_of_ones_own_counts_once_as_well(kind, batches):
    seen = []
    for each in ("plain", kind):
        model = Net(each)
        with lr.Calibration(model) as stats:
            for batch in batches:
                model(batch["x"].requires_grad_(), batch["ids"], batch.get("attention_mask")).square().mean().backward()
        seen.append({name: (s.repeats, s.inputs.rows, s.gradients) for name, s in stats.items() if name != "embed"})
    for name, (repeats, rows, gradients) in seen[0].items():
        assert seen[1][name][:2] == (repeats, rows)
        assert torch.allclose(seen[1][name][2], gradients, rtol=1e-5, atol=1e-12), name


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_weight_gradients_are_the_same(kind, batches):
    found = []
    for each in ("plain", kind):
        model = Net(each)
        model.first.weight.grad = torch.ones(8, 8)
        steps = []
        model.first.weight.register_post_accumulate_grad_hook(lambda weight, steps=steps: steps.append(weight))
        found.append(lr.weight_gradients(model, batches, lr.SampledCrossEntropy(), target=["first", "conv", "head"]))
        assert torch.equal(model.first.weight.grad, torch.ones(8, 8))
        assert model.head.weight.grad is None
        assert not steps
        model(batches[0]["x"].clone().requires_grad_(), batches[0]["ids"]).sum().backward()
        assert steps
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-7), name
