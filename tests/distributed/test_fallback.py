"""Uncompressed gradients where compression is slower."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cases import batches, difference, errors, flat, layers, made, train, wrap

EXACT, TIGHT = 0.0, 1e-5


def choose(state: Any, compress: bool) -> None:
    """As after loading the state of a run that has chosen."""
    state.load_state_dict(state.state_dict() | {"compress": torch.tensor(compress)})


def case_errors_are_paid_out(rank: int) -> dict[str, Any]:
    """Compressed steps, then uncompressed ones."""
    model, alone = made(), made()
    wrapped, state = wrap(model, {"rank": 2, "fallback": True})
    choose(state, True)
    sums: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    owed = 0.0
    for step, (x, y) in enumerate(batches(rank, 6)):
        if step == 4:
            owed = max(float(error.abs().max()) for error in errors(state).values())
            choose(state, False)
        for net, inner, total in ((wrapped, model, sums), (alone, alone, true)):
            net.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            for name, p in inner.named_parameters():
                total[name] = total.get(name, 0) + p.grad.clone()
    lost = 0.0
    for name, total in true.items():
        dist.all_reduce(total)
        lost = max(lost, float((sums[name] - total / 2).norm() / (total / 2).norm()))
    return {"owed": owed, "lost": lost, "left": layers(state)}


def test_errors_are_paid_out(seen):
    for process in seen:
        assert process["owed"] > 0
        assert process["lost"] < TIGHT
        assert process["left"] == []


def case_half(rank: int) -> dict[str, Any]:
    """Uncompressed gradients take half of the bytes, while they are timed and when they are chosen."""
    out: dict[str, Any] = {}
    for name in ("timed", "chosen"):
        wrapped, state = wrap(made(), {"rank": 2, "fallback": torch.float16})
        if name == "chosen":
            choose(state, False)
        train(wrapped, batches(rank, 3))
        out[name] = state.stats()["ratio"]
        out[f"{name}, difference"] = difference(flat(wrapped))
    _, fresh = wrap(made(), {"rank": 2, "fallback": torch.float16}, hook=False)
    fresh.load_state_dict(state.state_dict())
    return out | {"kept": bool(fresh.state_dict()["compress"])}


def test_half(seen):
    for process in seen:
        assert process == {
            "timed": 2.0,
            "timed, difference": EXACT,
            "chosen": 2.0,
            "chosen, difference": EXACT,
            "kept": False,
        }


def case_choice(rank: int) -> list[dict[str, Any]]:
    """Enough steps to time both ways: all processes make one choice and go on with it."""
    wrapped, state = wrap(made(), {"rank": 2, "fallback": True})
    train(wrapped, batches(rank, 10))
    before = "compress" in state.state_dict()
    train(wrapped, batches(rank, 10, 10))
    compress = state.state_dict().get("compress")
    train(wrapped, batches(rank, 1, 20))
    return [before, compress, difference(flat(wrapped)), layers(state) != []]


def test_choice(seen):
    (before, compress, apart, compressed), other = seen
    assert not before
    assert compress is not None
    assert bool(compress) == bool(other[1]) == compressed
    assert apart == EXACT
