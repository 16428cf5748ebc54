"""The first sample that calibration saw."""

from __future__ import annotations

import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.calibrate.example import first_sample


def test_the_first_sample_of_every_form_of_batch():
    x, y, size = torch.randn(5, 3), torch.arange(5), torch.tensor(2.0)
    assert torch.equal(first_sample(x, 5), x[:1])
    one = first_sample({"x": x, "labels": y, "size": size, "flag": True}, 5)
    assert torch.equal(one["x"], x[:1])
    assert torch.equal(one["labels"], y[:1])
    assert torch.equal(one["size"], size)
    assert one["flag"] is True
    pair = first_sample((x, [y, torch.eye(3)]), 5)
    assert torch.equal(pair[1][0], y[:1])
    assert torch.equal(pair[1][1], torch.eye(3))  # not one entry per sample


def test_statistics_keep_a_copy_of_the_first_sample():
    batches = [torch.randn(4, 6), torch.randn(4, 6)]
    first = batches[0][:1].clone()
    stats = lr.calibrate(nn.Sequential(nn.Linear(6, 3)), batches)
    batches[0].zero_()
    assert torch.equal(stats.example, first)
    assert not stats.with_target
