"""Counts are those of formulas and files, times are paired, and scores are means over samples."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.evaluation.latency import paired_seconds


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 30, bias=False))
    model[3].weight = model[0].weight
    return model


def test_bytes_are_those_of_the_file_behind_its_header(tmp_path):
    for model in (tied(), nn.Sequential(lr.LowRankLinear(8, 8, rank=2)).half()):
        lr.save(model, tmp_path / "m.safetensors")
        content = (tmp_path / "m.safetensors").read_bytes()
        (header,) = struct.unpack("<Q", content[:8])
        example = torch.randint(30, (4,)) if len(model) > 1 else torch.randn(4, 8).half()
        evaluation = lr.evaluate(model, [example], repeats=2)
        assert evaluation.bytes == len(content) - 8 - header
        assert evaluation.params == sum(p.numel() for p in model.parameters())


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(6, 5), (3, 6), 30),
        (nn.Conv2d(2, 4, 3, padding=1), (2, 2, 5, 5), 25 * 4 * 2 * 9),
        (lr.LowRankLinear(6, 5, rank=2), (3, 6), 22),
        (Attention(), (2, 4, 7, 8), 2 * 4 * 7 * 7 * 8),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (3, 7, 8),
            7 * (4 * 64 + 2 * 8 * 16) + 2 * 2 * 7 * 7 * 4,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_multiply_accumulates_are_those_of_the_formula(model, shape, macs):
    assert lr.evaluate(model, [torch.randn(shape)], repeats=2).macs == macs


def test_peak_memory_is_that_of_weights_and_live_tensors():
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 1))
    weights = 4 * (1000 + 100 + 100 + 1)
    evaluation = lr.evaluate(model, [torch.randn(50, 10)], repeats=2)
    assert evaluation.peak_memory == weights + 2 * 4 * 50 * 100  # the hidden layer before and after ReLU
    shared = nn.Sequential(nn.Linear(10, 10, bias=False), nn.ReLU(inplace=True), nn.Linear(10, 10, bias=False))
    shared[2].weight = shared[0].weight
    assert lr.evaluate(shared, [torch.randn(50, 10)], repeats=2).peak_memory == 400 + 2 * 4 * 50 * 10
    in_place = nn.Sequential(nn.Linear(10, 100), nn.ReLU(inplace=True), nn.Linear(100, 1))
    evaluation = lr.evaluate(in_place, [torch.randn(50, 10)], repeats=2)
    assert evaluation.peak_memory == weights + 4 * 50 * (100 + 1)


def test_scores_are_means_over_samples_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))), (torch.randn(2, 4), torch.randint(3, (2,)))]

    def accuracy(output, target):
        return (output.argmax(-1) == target).float().mean()

    evaluation = lr.evaluate(
        model,
        batches,
        metric={"a": accuracy, "n": lambda output, _: len(output)},
        score=lambda m: m.training,
        repeats=2,
    )
    right = sum((model[0](x).argmax(-1) == y).sum().item() for x, y in batches)
    assert evaluation.scores == pytest.approx({"a": right / 7, "n": (25 + 4) / 7, "score": 0.0})
    assert model[1].training
    assert list(lr.evaluate(model, batches, metric=accuracy, repeats=2).scores) == ["accuracy"]
    assert lr.evaluate(model, iter(batches), metric=accuracy, repeats=2).scores["accuracy"] == pytest.approx(right / 7)


def test_the_example_is_what_is_timed_and_counted():
    model, seen = nn.Linear(4, 3), []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    evaluation = lr.evaluate(model, [torch.randn(9, 4)], example=torch.randn(1, 4), repeats=5)
    assert set(seen) == {1}
    assert len(seen) >= 5
    assert evaluation.macs == 12


def test_two_models_are_timed_by_turns():
    now, order = [0.0], []

    def call(k, seconds):
        def run():
            order.append(k)
            now[0] += seconds * (1 + len(order) % 7)  # the machine is slower and faster

        return run

    first, second = paired_seconds([call(0, 1.0), call(1, 0.5)], 6, torch.device("cpu"), lambda: now[0])
    assert len(first) == len(second) == 6
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert set(pairs) == {(0, 1), (1, 0)}
    assert pairs[0] != pairs[1]


def test_a_comparison_as_table_markdown_and_json():
    dense = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    small = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, rank=2))
    batches = [(torch.randn(8, 20), torch.randint(5, (8,)))]
    comparison = lr.compare(
        dense, small, batches, metric={"zero": lambda output, target: 0.0, "four": lambda output, target: 4}, repeats=4
    )
    assert comparison.before.params == 525
    ratio = comparison.after.params / 525
    assert comparison.ratios()["parameters"] == ratio
    assert comparison.ratios()["four"] == 1
    assert comparison.ratios()["zero"] is None
    rows = [line.split("|")[1:-1] for line in comparison.to_markdown().splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells["parameters"] == ["525", str(comparison.after.params), f"{ratio:.3f}"]
    assert cells["latency, ms"][2] == f"{comparison.latency_ratio.median:.3f}"
    assert str(comparison).splitlines()[1].split() == ["parameters", *cells["parameters"]]
    body = json.loads(comparison.to_json())
    assert body["after"]["latency"]["median"] == comparison.after.latency.median
    assert body["ratio"]["parameters"] == ratio
    assert body["ratio"]["spread of the latency's"] == comparison.latency_ratio.spread
    again = lr.compare(comparison.before, comparison.after)
    assert again.latency_ratio.median == comparison.after.latency.median / comparison.before.latency.median
    assert json.loads(again.to_json())["ratio"]["spread of the latency's"] is None
    assert str(comparison.after).splitlines()[0].split() == ["parameters", cells["parameters"][1]]


BAD = {
    "got model of type int": lambda m: lr.evaluate(3, [torch.ones(1, 4)]),
    "got one Tensor, expected a list": lambda m: lr.evaluate(m, torch.ones(1, 4)),
    "got no batches in data": lambda m: lr.evaluate(m, []),
    "got repeats=1, expected an integer of at least 2": lambda m: lr.evaluate(m, [torch.ones(1, 4)], repeats=1),
    "metric 'a' of type int, expected a function": lambda m: lr.evaluate(m, [torch.ones(1, 4)], metric={"a": 3}),
    "got two models without data": lambda m: lr.compare(m, m),
    "got Linear and int, expected two models": lambda m: lr.compare(m, 3, [torch.ones(1, 4)]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(lr.LowRankError, match=message):
        BAD[message](nn.Linear(4, 4))
