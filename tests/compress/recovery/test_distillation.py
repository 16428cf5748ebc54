"""The distance from a teacher is the divergence by hand, and padding counts nowhere."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_layers as lr


def net(seed: int, rank: int | None = None) -> nn.Module:
    torch.manual_seed(seed)
    first = nn.Linear(6, 8) if rank is None else lr.LowRankLinear(6, 8, rank=rank)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 5)).double()


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class RulesOut(nn.Module):
    """Allows some of the classes alone, as an agent's environment does."""

    def __init__(self, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = torch.tensor(classes)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, self.classes, -torch.inf)


def by_hand(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_distance_of_outputs_is_the_divergence(temperature):
    model, teacher = net(0, rank=2), net(1)
    with lr.Distillation(model, teacher, temperature=temperature, distillation_weight=0.5) as distillation:
        value = distillation(model(X))
    torch.testing.assert_close(value, 0.5 * by_hand(model(X), teacher(X), temperature))
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_classes_that_the_models_rule_out_have_no_part_in_the_divergence():
    model, teacher = net(0, rank=2), net(1)
    possible = [1, 2, 3]
    models = [nn.Sequential(each, RulesOut((0, 4))) for each in (model, teacher)]
    with lr.Distillation(*models, temperature=2.0) as distillation:
        value = distillation(models[0](X))
    expected = by_hand(model(X)[:, possible], teacher(X)[:, possible], 2.0)
    torch.testing.assert_close(value, expected)
    weights = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, weights) for loss in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_recovering_minimizes_loss_and_divergence_together():
    model, teacher = net(0, rank=2), net(1)
    labels = torch.arange(7) % 5
    expected = F.cross_entropy(model(X), labels) + 0.25 * by_hand(model(X), teacher(X), 2.0)
    recovery = lr.recover_(
        model,
        [(X, labels)],
        steps=1,
        loss=F.cross_entropy,
        teacher=teacher,
        temperature=2.0,
        distillation_weight=0.25,
    )
    assert recovery.losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_hidden_states_and_outputs_that_are_no_logits():
    model, teacher = net(0, rank=2), net(1)
    recovery = lr.recover_(
        copy.deepcopy(model), [X], steps=1, teacher=teacher, distance="mse", hidden=["0", "1"], hidden_weight=0.1
    )
    expected = F.mse_loss(model(X), teacher(X))
    for last in (1, 2):
        ours, theirs = model[:last](X), teacher[:last](X)
        expected = expected + 0.05 * (ours - theirs).square().sum() / theirs.square().sum()
    assert recovery.losses[0] == pytest.approx(expected.item(), rel=1e-6)


class Masked(nn.Module):
    """A model of sequences that takes a mask of its positions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None):
        return self.head(self.body(x).tanh())


@pytest.mark.parametrize("told", ["mask", "labels"])
def test_padding_counts_nowhere(told):
    x = torch.randn(2, 5, 6)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"x": x, "attention_mask": real if told == "mask" else torch.ones(2, 5)}
    if told == "labels":
        batch["labels"] = torch.zeros(2, 5, dtype=torch.long).masked_fill(real == 0, -100)
    model, teacher = Masked(0), Masked(1)
    ours, theirs = (m(x, real).detach()[real == 1] for m in (model, teacher))
    expected = by_hand(ours, theirs, 1.0)
    hidden = [m.body(x).detach()[real == 1] for m in (model, teacher)]
    if told == "mask":
        expected += (hidden[0] - hidden[1]).square().sum() / hidden[1].square().sum()
    recovery = lr.recover_(model, [batch], steps=1, teacher=teacher, hidden=["body"] if told == "mask" else [])
    assert recovery.losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_the_class_dimension_of_pictures():
    model, teacher = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    x = torch.randn(2, 2, 4, 4)
    with lr.Distillation(model, teacher, class_dim=1) as distillation:
        value = distillation(model(x))
    ours, theirs = (m(x).movedim(1, -1) for m in (model, teacher))
    torch.testing.assert_close(value, by_hand(ours, theirs, 1.0))


def test_inside_the_block_only_and_with_the_teacher_in_its_own_mode_afterwards():
    model, teacher = net(0), nn.Sequential(net(1), nn.Dropout(0.9)).train()
    with lr.Distillation(model, teacher) as distillation:
        assert distillation(model(X)) == distillation(model(X))  # no dropout
    assert teacher.training
    assert teacher[1].training
    assert not model._forward_pre_hooks
    with pytest.raises(lr.LowRankError, match="call the model inside the with block"):
        distillation(model(X))


def test_the_callback_for_lightning(monkeypatch):
    """By the names of Lightning's hooks, which is not among what the tests install."""
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=type("Callback", (), {})))
    model, teacher, trainer = net(0, rank=2), net(1), SimpleNamespace(global_step=0)
    distillation = lr.Distillation(model, teacher)
    callback = distillation.to_lightning_callback()
    for end in (callback.on_train_end, lambda *args: callback.on_exception(*args, ValueError())):
        callback.on_train_start(trainer, model)
        torch.testing.assert_close(distillation(model(X)), by_hand(model(X), teacher(X), 1.0))
        end(trainer, model)
        assert not model._forward_pre_hooks
        with pytest.raises(lr.LowRankError, match="inside the with block"):
            distillation(model(X))
