"""Stages are trained towards the dense model's, in forward order, and never make the model worse."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.refinement import output_error, refine

from ..recovery.digits import batches, cnn, factorized, mlp, trained


def blocks(depth: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))


def compressed(dense: nn.Module, rank: int = 4) -> nn.Module:
    return lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, rank=rank, methods=[lr.SVDMethod()]))


def data(count: int = 12, width: int = 16) -> list[torch.Tensor]:
    return list(torch.randn(count, 24, width, generator=torch.Generator().manual_seed(1)))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


@pytest.mark.parametrize("make", [mlp, cnn])
def test_predictions_on_unseen_digits_come_nearer(make):
    dense = trained(make())
    model = factorized(dense, 0.35)
    inputs = [x for x, _ in batches(0, 1200, 50)]
    unseen = torch.cat([x for x, _ in batches(1200, 1700)])

    def divergence() -> float:
        with torch.no_grad():
            p, q = dense(unseen).log_softmax(-1), model(unseen).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    before = divergence()
    refinement = lr.refine_(model, dense, inputs, epochs=10, lr=3e-3)
    assert refinement.kept
    assert refinement.after < refinement.before
    assert divergence() < 0.8 * before
    assert all(stage.after < stage.before for stage in refinement.stages if stage.epoch)


def test_states_that_are_no_logits_come_nearer():
    dense, inputs = blocks(3), data(40)
    model, unseen = compressed(dense), torch.randn(500, 16, generator=torch.Generator().manual_seed(2))

    def error() -> float:
        with torch.no_grad():
            return float((model(unseen) - dense(unseen)).square().mean())

    before = error()
    refinement = lr.refine_(model, dense, inputs, epochs=10, lr=1e-2, distance="mse")
    assert refinement.kept
    assert error() < 0.95 * before


def test_each_stage_sees_the_refined_prefix_and_the_dense_model_s_outputs(monkeypatch):
    dense = blocks(3)
    model, inputs = compressed(dense), data()
    seen = []
    fit = refine.fit_stage_

    def watched(name, trained_parameters, examples, held_out, error, settings):
        index = int(name.split(".")[0])
        with torch.no_grad():
            outputs = [example.given.compute()[0] for example in (*examples, *held_out)]
            ours = [model[: index + 1](x) for x in inputs]
        expected = [example.expected()[0] for example in (*examples, *held_out)]
        theirs = [dense[: index + 1](x) for x in inputs]
        order = [*range(7), *range(8, 12), 7]  # the eighth batch is held out
        assert all(torch.equal(found, ours[k]) for found, k in zip(outputs, order, strict=True))
        assert all(torch.equal(found, theirs[k]) for found, k in zip(expected, order, strict=True))
        seen.append(name)
        return fit(name, trained_parameters, examples, held_out, error, settings)

    monkeypatch.setattr(refine, "fit_stage_", watched)
    lr.refine_(model, dense, inputs, stages=["0", "1", "2"], lr=1e-2)
    assert seen == ["0", "1", "2"]


@pytest.mark.parametrize(("reads_tokens", "mixing"), [(True, 0.5), (False, 1.0)])
def test_a_model_of_tokens_goes_half_of_the_way(reads_tokens, mixing):
    dense = nn.Sequential(nn.Embedding(50, 16), *blocks(2), nn.Linear(16, 50)) if reads_tokens else blocks(2)
    words = torch.randint(50, (16, 24), generator=torch.Generator().manual_seed(1))
    inputs = list(words.split(1)) if reads_tokens else data(16)
    start = compressed(dense)
    before = state(start)
    ends = {}
    for each in (None, 1.0, 0.25):
        model = copy.deepcopy(start)
        assert lr.refine_(model, dense, inputs, epochs=4, lr=1e-2, distance="mse", mixing=each).kept
        ends[each] = state(model)
    assert not same(before, ends[1.0])
    for name, old in before.items():
        way = ends[1.0][name] - old
        torch.testing.assert_close(ends[None][name], old + mixing * way, rtol=0, atol=1e-6)
        torch.testing.assert_close(ends[0.25][name], old + 0.25 * way, rtol=0, atol=1e-6)


def test_behind_the_last_stage_that_is_trained_no_batch_goes_on():
    """The logits of all batches would be in memory at once: 13 GB for 65,536 tokens of SmolLM2, of both models."""
    head, calls = nn.Linear(16, 50), Counter()
    dense = nn.Sequential(*blocks(2), head)
    model = nn.Sequential(*compressed(dense[:2]), copy.deepcopy(head))
    model[2].register_forward_hook(lambda *_: calls.update(["head"]))
    lr.refine_(model, dense, data(16), epochs=1)
    assert calls["head"] == 2 * 2 + 1  # two batches held out, before and after, and the order of the stages


def test_stages_of_wide_outputs_are_trained_and_hold_none_of_them(monkeypatch):
    dense = nn.Sequential(*blocks(1), nn.Linear(16, 40))
    one, other = compressed(dense), compressed(dense)
    narrow = lr.refine_(one, dense, data(40), epochs=4, lr=1e-2)
    held, fit = [], refine.fit_stage_

    def watched(name, trained_parameters, examples, *args):
        held.append((name, {example.kept is None and example.dense._given is None for example in examples}))
        return fit(name, trained_parameters, examples, *args)

    monkeypatch.setattr(refine, "fit_stage_", watched)
    monkeypatch.setattr(output_error, "WIDE", 20)
    wide = lr.refine_(other, dense, data(40), epochs=4, lr=1e-2)
    assert held == [("0.0", {False}), ("1", {True})]
    assert wide.stages[0] == narrow.stages[0]
    assert wide.kept
    assert wide.stages[1].after < wide.stages[1].before
    assert wide.after < 1.1 * narrow.after


def test_stages_that_do_not_gain_keep_their_bits(monkeypatch):
    dense = blocks(3)
    model = compressed(dense)
    before = state(model)
    monkeypatch.setattr(refine, "_distance", lambda *_: 1.0)  # so that not all is undone in the end
    refinement = lr.refine_(model, dense, data(), lr=1e3, clip=None)
    assert refinement.kept
    assert [stage.epoch for stage in refinement.stages] == [0, 0, 0]
    assert same(state(model), before)


def test_all_is_undone_where_outputs_get_worse(monkeypatch):
    dense = blocks(2)
    model = compressed(dense)
    before, distances = state(model), iter([1.0, 2.0])
    monkeypatch.setattr(refine, "_distance", lambda *_: next(distances))
    refinement = lr.refine_(model, dense, data(), lr=1e-2)
    assert not refinement.kept
    assert any(stage.epoch for stage in refinement.stages)
    assert same(state(model), before)
    assert "undone" in str(refinement)


class Failing(nn.Module):
    """Fails in its second training step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 16), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        if self.calls == 2:
            raise RuntimeError("no memory left")
        return self.linear(x)


def test_a_failure_leaves_the_model_as_it_was():
    dense = nn.Sequential(*blocks(2), Failing()).train()
    model = compressed(dense)
    before = state(model)
    with pytest.raises(RuntimeError, match="no memory left"):
        lr.refine_(model, dense, data(), lr=1e-2)
    assert same(state(model), before)
    assert hooks(model) == hooks(dense) == 0
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in (*model.parameters(), *dense.parameters()))


@pytest.mark.parametrize("depth", [2, 6])
def test_every_stage_is_run_as_often_however_deep_the_model(depth):
    dense = blocks(depth)
    model = compressed(dense)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith("down"):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    lr.refine_(model, dense, data(), epochs=3)
    # 3 epochs of 11 batches, 4 times the held-out one, once all of them to go on, but for the last stage, the first
    # batch for the order, and the held-out one for the distance before and after
    *others, last = (calls[name] for name in sorted(calls, key=lambda name: int(name.split(".")[0])))
    assert last == 3 * 11 + 4 + 1 + 2
    assert {*others} == {last + 12}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(16, 5)

    def forward(self, src: torch.Tensor, src_key_padding_mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            src = layer(src, src_key_padding_mask=src_key_padding_mask)
        return self.head(src)


def test_padding_counts_nowhere():
    torch.manual_seed(0)
    dense = Reader()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:, 4:] = True
    found = []
    for filler in (0.0, 50.0):
        rows = torch.randn(6, 4, 6, 16, generator=torch.Generator().manual_seed(1))
        rows[:, mask] = filler
        inputs = [{"src": x, "src_key_padding_mask": mask} for x in rows]
        model = compressed(dense)
        refinement = lr.refine_(model, dense, inputs, lr=1e-3)
        found.append((refinement, state(model)))
    assert found[0][0].stages
    for ours, theirs in zip(found[0][0].stages, found[1][0].stages, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_stage_that_is_called_twice_stays_as_it_is():
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    dense = nn.Sequential(shared, nn.Sequential(nn.Linear(16, 16), nn.Tanh()), shared)
    model = compressed(dense)
    before = state(model)
    refinement = lr.refine_(model, dense, data(), lr=1e-2, stages=["0", "1"])
    assert [stage.name for stage in refinement.stages] == ["1"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name[0] == "0")


def test_factors_alone():
    dense = blocks(2)
    model = compressed(dense)
    gradient = model[0][0].down.weight.grad = torch.ones(4, 16)
    model[0].append(nn.LayerNorm(16))
    dense[0].append(nn.LayerNorm(16))
    before = state(model)
    lr.refine_(model, dense, data(), lr=1e-2, trainable="factors")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("0.2")]
    assert model[0][0].down.weight.grad is gradient


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = (0, 1, 2) if x.shape[0] == 24 else (0, 2, 1)
        for k in way:
            x = self.layers[k](x)
        return x


def changes_its_input() -> nn.Module:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.linear(x))

    return nn.Sequential(nn.Linear(16, 16), Adds())


@pytest.mark.parametrize(
    ("make", "inputs", "text"),
    [
        (lambda: blocks(2), data(1), "got 1 batches, expected at least 2"),
        (Branching, [*data(3), torch.randn(10, 16)], "a batch comes to 'layers.2.0', expected the stage 'layers.1.0'"),
        (changes_its_input, data(3), "changes its input in place"),
        (lambda: blocks(2), [*data(3), torch.full((24, 16), float("nan"))], "NaN|is nan"),
    ],
    ids=["one batch", "branching", "in place", "nan"],
)
def test_what_cannot_be_refined_is_refused_and_nothing_changes(make, inputs, text):
    dense = make()
    model = compressed(dense)
    before = state(model)
    with pytest.raises(lr.LowRankError, match=text):
        lr.refine_(model, dense, inputs)
    assert same(state(model), before)
    assert hooks(model) == hooks(dense) == 0


class Hidden(nn.Module):
    """Its stage returns nothing, and leaves what it computes in an attribute."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> None:
            self.found = self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.stage = self.Stage()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.stage(x)
        return self.stage.found


def test_a_stage_that_returns_no_tensor_is_refused_and_nothing_changes():
    torch.manual_seed(0)
    dense = Hidden()
    model = compressed(dense)
    before = state(model)
    with pytest.raises(lr.LowRankError, match="refine_: a stage returned no tensor, expected one; name other stages"):
        lr.refine_(model, dense, data(), stages=["stage"])
    assert same(state(model), before)
    assert hooks(model) == hooks(dense) == 0


def test_bad_arguments():
    dense = blocks(2)
    model = compressed(dense)
    with pytest.raises(lr.LowRankError, match="no stage to train"):
        lr.refine_(copy.deepcopy(dense), dense, data())
    with pytest.raises(lr.LowRankError, match=r"shares .* with the model"):
        lr.refine_(model, model, data())
    with pytest.raises(lr.LowRankError, match=r"^refine_: got no parameter to train"):
        lr.refine_(copy.deepcopy(model).requires_grad_(False), dense, data())
    with pytest.raises(lr.LowRankError, match="did you mean epochs="):
        lr.refine_(model, dense, data(), epoch=3)
    for bad in ({"epochs": 0}, {"held_out": 1}, {"lr": -1.0}, {"trainable": "none"}, {"distance": "cosine"}):
        with pytest.raises(lr.LowRankError, match="Settings: got"):
            lr.refine_(model, dense, data(), **bad)
    for mixing in (0, 1.5, -0.5, float("nan"), True, "half"):
        with pytest.raises(lr.LowRankError, match=r"RefinementSettings: got mixing=.*, expected a number in \(0, 1\]"):
            lr.refine_(model, dense, data(), mixing=mixing)
