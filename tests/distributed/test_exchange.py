"""Tensors averaged in the dtype of the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank_layers.distributed.collectives import Collectives
from lowrank_layers.distributed.exchange import Exchange
from tests.processes import run_processes

from .cases import FULL, batches, difference, flat, layers, lost, made, train, wrap

EXACT, TIGHT = 0.0, 1e-5


def case_exchange(rank: int) -> dict[str, Any]:
    """By wire: the result, the mean of all contributions, and the true mean."""
    collectives = Collectives(None, None, None)
    out = {}
    for wire in (None, torch.float16, torch.bfloat16, torch.int8):
        generator = torch.Generator().manual_seed(rank)
        sizes = torch.logspace(-3, 3, 4).view(1, 4, 1)
        factors = [torch.randn(2, 4, size, generator=generator) * sizes for size in (3, 70, 130)]
        whole = [torch.randn(shape, generator=generator) for shape in ((), (5,), (9, 11))]
        true = torch.cat([tensor.flatten() for tensor in (*factors, *whole)])
        dist.all_reduce(true)
        averaged = Exchange(collectives, wire).average_(factors, whole, range(3))
        contributions = torch.cat([part.flatten() for part in averaged.contributions])
        dist.all_reduce(contributions)
        got = torch.cat([tensor.flatten() for tensor in (*factors, *whole)])
        out[str(wire)] = {
            "got": got,
            "true": true / 2,
            "contributions": contributions / 2,
            "factors": contributions.numel(),
            "difference": difference(got),
            "sent": averaged.sent,
        }
    bad = torch.ones(1, 4, 40)
    if rank == 1:
        bad[0, 2, 39] = torch.inf
    before = bad.clone()
    averaged = Exchange(collectives, torch.int8).average_([bad], [torch.ones(3)], [0])
    return out | {"bad": (averaged.finite, torch.equal(bad, before))}


@pytest.mark.parametrize("wire", [None, torch.float16, torch.bfloat16, torch.int8])
def test_exchange(seen, wire):
    for process in seen:
        case = process[str(wire)]
        factors = slice(case["factors"])
        assert case["difference"] == EXACT
        near = {None: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.int8: 2e-2}[wire]
        for part in (factors, slice(case["factors"], None)):
            assert float((case["got"] - case["true"])[part].norm() / case["true"][part].norm()) < near
        if wire in (None, torch.int8):
            torch.testing.assert_close(case["contributions"], case["got"][factors], rtol=1e-5, atol=1e-5)
    sent = {name: case["sent"] for name, case in seen[0].items() if name != "bad"}
    assert sent["torch.float16"] == sent["None"] / 2
    assert sent["torch.int8"] < 0.35 * sent["None"]


def test_all_processes_learn_that_a_value_is_not_finite_in_one(everywhere):
    assert [process["exchange"]["bad"] for process in everywhere] == [(False, True)] * 2


def case_bf16_wire(rank: int) -> dict[str, Any]:
    wrapped, _ = wrap(made(), {**FULL, "wire": torch.bfloat16})
    plain, _ = wrap(made(), None)
    x, y = batches(rank, 1)[0]
    for model in (wrapped, plain):
        nn.functional.mse_loss(model(x), y).backward()
    pairs = zip(wrapped.parameters(), plain.parameters(), strict=True)
    return {"error": max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)}


def test_bf16_wire(seen):
    assert 0 < seen[0]["error"] < 1e-2


def case_overflowing_wire(rank: int) -> dict[str, Any]:
    """Factors that overflow fp16 are sent again in fp32."""
    wrapped, state = wrap(made(), {"rank": 2, "wire": torch.float16})
    alone, _ = wrap(made(), {"rank": 2})
    x, y = batches(rank, 1)[0]
    for model in (wrapped, alone):
        (nn.functional.mse_loss(model(x), y) * 1e7).backward()
    pairs = zip(wrapped.parameters(), alone.parameters(), strict=True)
    off = max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)
    return {"off": off, "compressed": layers(state)}


def test_overflowing_wire(seen):
    for process in seen:
        assert process["off"] < TIGHT
        assert process["compressed"]


def three(rank: int) -> dict[str, Any]:
    """More processes than blocks of some tensors, and not a power of two."""
    out: dict[str, Any] = {}
    for name, settings in {"int8": {"rank": 1, "wire": torch.int8}, "fp32": {"rank": 1}}.items():
        wrapped, _ = wrap(made(), settings)
        train(wrapped, batches(rank, 20))
        out[name] = {"difference": difference(flat(wrapped)), "weights": flat(wrapped)}
    return out | {"lost": lost(rank, {"rank": 1, "wire": torch.int8})}


def test_three_processes(tmp_path):
    for process in run_processes(three, tmp_path, world=3):
        assert process["int8"]["difference"] == process["fp32"]["difference"] == EXACT
        assert process["lost"] < 1e-4
        apart = (process["int8"]["weights"] - process["fp32"]["weights"]).norm() / process["fp32"]["weights"].norm()
        assert 0 < apart < 0.02
