"""Sparse gradients are averaged uncompressed, beside compressed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowrank_layers as lr
from tests.processes import run_processes

from .cases import batches, difference, flat, layers, made, train, wrap
from .models import SparseWords

EXACT, TIGHT = 0.0, 1e-5


def case_sparse_gradients(rank: int) -> dict[str, Any]:
    """For each kind of rank and wire: in the first step, sparse gradients equal those of plain DDP."""
    out: dict[str, Any] = {}
    for name, settings in {
        "rank": {"rank": 2},
        "start_step": {"rank": 2, "start_step": 3},
        "budget": {"rank": lr.Budget(bytes=3000)},
        "energy": {"rank": lr.Energy(0.8)},
        "fallback": {"rank": 2, "fallback": torch.float16},
        "integers": {"rank": 2, "wire": torch.int8},
    }.items():
        plain, _ = wrap(made(SparseWords), None)
        wrapped, state = wrap(made(SparseWords), settings)
        if name == "fallback":
            chosen = {"step": 0, "processes": 2, "compress": False}
            state.load_state_dict({key: torch.tensor(value) for key, value in chosen.items()})
        x, y = batches(rank, 1)[0]
        x = x * rank  # one row in the first process, many in the second
        for model in (plain, wrapped):
            nn.functional.mse_loss(model(x), y).backward()
        grads = {key: p.grad for key, p in wrapped.module.named_parameters()}
        sparse = {key: p.grad for key, p in plain.module.named_parameters() if p.grad.is_sparse}
        off = [float((grads[key].to_dense() - grad.to_dense()).abs().max()) for key, grad in sparse.items()]
        train(wrapped, batches(rank, 6))
        _, fresh = wrap(made(SparseWords), settings, hook=False)
        out[name] = {
            "sparse": sorted(key for key, grad in grads.items() if grad.is_sparse),
            "off": max(off),
            "compressed": layers(state),
            "difference": difference(flat(wrapped)),
            "same keys": set(fresh.state_dict()) == set(state.state_dict()),
        }
        fresh.load_state_dict(state.state_dict())
    return out


def test_sparse_gradients(seen):
    sparse = ["bag.weight", "pairs.down.weight", "words.weight"]
    for process in seen:
        for name, got in process.items():
            assert got["sparse"] == sparse
            assert got["off"] < TIGHT
            assert got["difference"] == EXACT
            assert not set(got["compressed"]) & set(sparse)
            assert bool(got["compressed"]) != (name == "fallback")
            # ranks that a rule found are not in a fresh state
            assert got["same keys"] == (name in ("rank", "start_step", "integers"))


def alone(rank: int) -> dict[str, Any]:
    """One process."""
    plain, _ = wrap(made(SparseWords), None)
    wrapped, state = wrap(made(SparseWords), {"rank": 2})
    for model in (plain, wrapped):
        x, y = batches(rank, 1)[0]
        nn.functional.mse_loss(model(x), y).backward()
    words = [model.module.words.weight.grad for model in (plain, wrapped)]
    return {"off": float((words[0].to_dense() - words[1].to_dense()).abs().max()), "layers": layers(state)}


def test_sparse_gradients_of_one_process(tmp_path):
    (process,) = run_processes(alone, tmp_path, world=1)
    assert process["off"] == 0
    assert process["layers"] == ["head.weight", "middle.down.weight", "middle.up.weight", "pairs.up.weight"]
