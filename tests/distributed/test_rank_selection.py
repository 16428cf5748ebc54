"""Ranks by rules and by a budget of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowrank_layers as lr
from tests.contracts.tables import RULES, spectrum

from .cases import batches, caught, difference, flat, layers, made, train, wrap

EXACT = 0.0


def case_budget(rank: int) -> dict[str, Any]:
    """Bytes per step after the first one, which is uncompressed; and budgets that are too small."""
    out: dict[str, Any] = {}
    for name, settings in {
        "4000": {"rank": lr.Budget(bytes=4000)},
        "tenth": {"rank": lr.Budget(bytes=0.1)},
        "int8": {"rank": lr.Budget(bytes=2000), "wire": torch.int8, "alternate": True},
        "ample": {"rank": lr.Budget(bytes=10**9)},
    }.items():
        wrapped, state = wrap(made(), settings)
        train(wrapped, batches(rank, 1))
        whole = state.stats()["bytes_sent"]
        train(wrapped, batches(rank, 2, 1))
        ranks = {name: layer["rank"] for name, layer in state.stats()["layers"].items()}
        out[name] = {"whole": whole, "step": (state.stats()["bytes_sent"] - whole) / 2, "ranks": ranks}
        out[name]["difference"] = difference(flat(wrapped))
    model = made()
    model.middle.requires_grad_(False)
    wrapped, state = wrap(model, {"rank": lr.Budget(bytes=4000)})
    train(wrapped, batches(rank, 3))
    model.middle.requires_grad_(True)
    wrapped, _ = wrap(model, {"state": state}, bucket_cap_mb=25)
    out["later"] = caught(lambda rank: train(wrapped, batches(rank, 1)), rank)["error"]
    model = made()
    model.middle.requires_grad_(False)
    wrapped, state = wrap(model, {"rank": lr.Budget(bytes=0.1)})
    train(wrapped, batches(rank, 3))
    model.middle.requires_grad_(True)
    wrapped, _ = wrap(model, {"state": state})
    train(wrapped, batches(rank, 3))
    out["fraction later"] = layers(state)
    wrapped, _ = wrap(made(), {"rank": lr.Budget(bytes=100)})
    out["small"] = caught(lambda rank: train(wrapped, batches(rank, 1)), rank)["error"]
    return out


def test_budget(seen):
    for process in seen:
        limits = {"4000": 4000, "tenth": 0.1 * process["tenth"]["whole"], "int8": 2000}
        # on a wire of int8 buckets are padded, and flags have a block of their own
        room = {"int8": 33 * 2 * 8}
        for name, limit in limits.items():
            assert 0.5 * limit < process[name]["step"] <= limit + room.get(name, 0)
            assert process[name]["ranks"]
            assert process[name]["difference"] == EXACT
        assert len(set(process["4000"]["ranks"].values())) > 1, "one rank for all"
        assert process["ample"]["ranks"] == {}
        assert "the smallest options cost" in process["small"]
        assert "the smallest options cost 580" in process["later"], "bytes were spent twice"
        assert process["fraction later"] == ["branch.weight", "first.weight", "last.weight", "middle.weight"]


def case_rules(rank: int) -> dict[str, bool]:
    """Whether each rule finds the rank that it finds in the averaged gradient."""
    plain, _ = wrap(made(), None)
    x, y = (torch.cat(parts) for parts in zip(*batches(rank, 12), strict=True))
    nn.functional.mse_loss(plain(x), y).backward()
    spectra = {name: spectrum(p.grad) for name, p in plain.module.named_parameters() if p.grad.ndim == 2}
    # where half of the values are rounding, a rule that looks at their median finds it, as it should
    spectra = {name: seen for name, seen in spectra.items() if seen.values.median() > 1e-4 * seen.values[0]}
    assert len(spectra) > 1
    given = [row.rule for row in RULES] + [lr.ParameterFraction(0.2), lambda spectrum: len(spectrum.values) // 3]
    out = {}
    for rule in given:
        wrapped, state = wrap(made(), {"rank": rule})
        nn.functional.mse_loss(wrapped(x), y).backward()
        out[str(rule)] = all(rule(seen) == int(state.state_dict()[f"rank.{name}"]) for name, seen in spectra.items())
    return out


def test_rules(seen):
    for process in seen:
        assert len(process) == len(RULES) + 2
        assert all(process.values()), process
