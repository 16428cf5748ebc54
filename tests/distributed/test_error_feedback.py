"""Nothing is lost: what is not sent is remembered, whatever the gradients are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .cases import batches, difference, errors, flat, lost, made, train, wrap

EXACT, TIGHT = 0.0, 1e-5


def case_unused_parameters_keep_their_errors(rank: int) -> dict[str, float]:
    return {
        "rank 1": lost(rank, {"rank": 1}, branch=True),
        "alternate": lost(rank, {"rank": 1, "alternate": True}, branch=True),
    }


def test_unused_parameters_keep_their_errors(seen):
    assert all(part < TIGHT for process in seen for part in process.values())


def case_own_errors(rank: int) -> list[float]:
    """The part of each error within the directions that were just sent: the own contribution leaves nothing there."""
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 9))
    parameters = dict(wrapped.module.named_parameters())
    parts = []
    for name, error in errors(state).items():
        left, _ = state.factors(parameters[name])
        parts.append(float((left.mT @ error[0]).norm() / error.norm()))
    return parts


def test_own_errors(seen):
    assert all(len(parts) == 4 and max(parts) < TIGHT for parts in seen)


def remembered(state: lr.LowRankCommState) -> dict[str, Tensor]:
    """Directions and errors."""
    return {key: tensor for key, tensor in state.state_dict().items() if "right." in key or "error." in key}


def case_zero_gradient_after_others(rank: int) -> dict[str, bool]:
    """The errors of the steps before are still owed when all processes have a gradient of zeros."""
    wrapped, state = wrap(made(), {"rank": 1})
    train(wrapped, batches(rank, 6))
    before = remembered(state)
    wrapped.zero_grad()
    (wrapped(batches(rank, 1)[0][0]).sum() * 0).backward()
    kept = all(torch.equal(tensor, remembered(state)[key]) for key, tensor in before.items())
    owed = all(bool(tensor.any()) for key, tensor in before.items() if "error." in key)
    return {"owed": owed, "kept": kept, "zeros": not any(bool(p.grad.any()) for p in wrapped.parameters())}


def test_zero_gradient_after_others(seen):
    assert seen == [{"owed": True, "kept": True, "zeros": True}] * 2


def case_zero_gradient(rank: int) -> dict[str, Any]:
    wrapped, _ = wrap(made(), {"rank": 1})
    for x, _ in batches(rank, 3):
        wrapped.zero_grad()
        (wrapped(x).sum() * 0).backward()
        assert all(not p.grad.any() for p in wrapped.parameters())
    before = float(nn.functional.mse_loss(wrapped(x), batches(rank, 3)[-1][1]).detach())
    train(wrapped, batches(rank, 30) + batches(rank, 30))
    after = float(nn.functional.mse_loss(wrapped(x), batches(rank, 3)[-1][1]).detach())
    return {"before": before, "after": after, "difference": difference(flat(wrapped))}


def test_zero_gradient(seen):
    for process in seen:
        assert math.isfinite(process["after"])
        assert process["after"] < process["before"]
        assert process["difference"] == EXACT


def case_non_finite(rank: int) -> dict[str, Any]:
    model = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    wrapped, state = wrap(model, {"rank": 2, "scaler": scaler})
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02)
    seen: dict[str, Any] = {}
    for step, (x, y) in enumerate(batches(rank, 12)):
        if step == 6:
            seen["before"], weights = remembered(state), flat(wrapped)
        bad = step == 6 and rank == 1
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(wrapped(x * torch.inf if bad else x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 6:
            seen["after"], seen["skipped"] = remembered(state), torch.equal(weights, flat(wrapped))
            seen["scale"] = scaler.get_scale()
    seen["moved"] = not torch.equal(weights, flat(wrapped))
    return seen | {"finite": bool(flat(wrapped).isfinite().all()), "difference": difference(flat(wrapped))}


def test_non_finite(seen):
    for process in seen:
        assert process["skipped"]
        assert process["scale"] == 512
        assert len(process["before"]) == 2 * 4
        assert process["before"].keys() == process["after"].keys()
        for key, tensor in process["before"].items():
            assert torch.equal(tensor, process["after"][key]), key
            assert tensor.any(), key
        assert process["moved"]
        assert process["finite"]
        assert process["difference"] == EXACT


def case_overflow_of_the_second_factor(rank: int) -> dict[str, bool]:
    """A column of 3e38 has finite entries but no finite norm: the second factor overflows, and the first does not."""
    wrapped, state = wrap(made(lambda: nn.Linear(32, 8, bias=False)), {"rank": 1, "local_iterations": 0})
    train(wrapped, batches(rank, 2))
    before = remembered(state)
    x = torch.zeros(1, 32)
    x[0, 0] = 3e38
    wrapped.zero_grad()
    wrapped(x).sum().backward()
    kept = all(torch.equal(tensor, remembered(state)[key]) for key, tensor in before.items())
    return {"all NaN": all(bool(p.grad.isnan().all()) for p in wrapped.parameters()), "kept": kept}


def test_overflow_of_the_second_factor(seen):
    assert seen == [{"all NaN": True, "kept": True}] * 2


def case_halved_scale(rank: int) -> list[float]:
    """Norms of the unscaled gradient after a step in which the scale stays, and in which it is halved."""
    norms = []
    for factor in (1.0, 0.5):
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
        wrapped, _ = wrap(made(), {"rank": 1, "scaler": scaler})
        for step, (x, y) in enumerate(batches(rank, 7)):
            if step == 6:
                scaler.scale(torch.zeros(1))
                scaler.update(65536.0 * factor)
            wrapped.zero_grad()
            scaler.scale(nn.functional.mse_loss(wrapped(x), y)).backward()
        norms.append(float(torch.stack([p.grad.norm() for p in wrapped.parameters()]).norm()) / scaler.get_scale())
    return norms


def test_halved_scale(seen):
    for kept, halved in seen:
        assert halved == pytest.approx(kept, rel=TIGHT)


def case_units(rank: int) -> dict[str, Any]:
    """How far averaged gradients of a scaled loss, divided by the scale, are from those of the loss."""
    out: dict[str, Any] = {}
    for name, settings in {
        "rank": {"rank": 2},
        "alternate": {"rank": 2, "alternate": True},
        "budget": {"rank": lr.Budget(bytes=4000)},
        "relative error": {"rank": lr.RelativeError(0.3)},
        "integers": {"rank": 2, "wire": torch.int8, "error_dtype": torch.int8},
    }.items():
        found: dict[float, list[Tensor]] = {}
        ranks = {}
        for scale in (1.0, 2.0**60, 2.0**100, 2.0**-100):
            wrapped, state = wrap(made(), settings)
            found[scale] = []
            for x, y in batches(rank, 4):
                wrapped.zero_grad()
                (nn.functional.mse_loss(wrapped(x), y) * scale).backward()
                found[scale].append(torch.cat([p.grad.flatten() / scale for p in wrapped.parameters()]))
            stats = state.stats()["layers"]
            ranks[scale] = {name: layer["rank"] for name, layer in stats.items()}
            residuals = [layer["residual"] for layer in stats.values()]
            assert all(0 < residual < math.inf for residual in residuals)
        plain = found.pop(1.0)
        off = {
            scale: max(float((a - b).norm() / b.norm()) for a, b in zip(grads, plain, strict=True))
            for scale, grads in found.items()
        }
        out[name] = {"off": off, "ranks": [ranks[scale] == ranks[1.0] != {} for scale in off]}
    return out


def test_units(seen):
    """The squares of gradients of 1e18 or 1e-30 overflow or vanish in fp32."""
    for process in seen:
        for name, got in process.items():
            # what lies between two integers may be rounded to either: one level of 127
            assert max(got["off"].values()) < (1 / 127 if name == "integers" else 1e-4), (name, got)
            assert all(got["ranks"]), (name, got)
