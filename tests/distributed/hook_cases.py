"""What breaks torch's own hook, and checkpoints: each case is run by both processes and returns what it saw."""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from datetime import timedelta
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.distributed import fallback
from lowrank_layers.distributed.collectives import Collectives
from lowrank_layers.distributed.exchange import Exchange
from tests.contracts.tables import RULES, spectrum

from .hook_worker import FULL, Case, Net, SparseWords, batches, caught, conserved, difference, flat, made, train, wrap


def many_buckets(rank: int) -> list[float]:
    out = []
    for _ in range(20):
        wrapped, _ = wrap(made(), {"rank": 2})
        train(wrapped, batches(rank, 4))
        out.append(difference(flat(wrapped)))
    return out


def everything_compressed(rank: int) -> dict[str, Any]:
    """What the batched hook is for: one matrix after another, at once."""
    wrapped, state = wrap(made(), {"rank": 1}, bucket_cap_mb=25)
    train(wrapped, batches(rank, 3))
    return {"layers": sorted(state.stats()["layers"]), "difference": difference(flat(wrapped))}


def zero_gradient(rank: int) -> dict[str, Any]:
    wrapped, state = wrap(made(), {"rank": 1})
    for x, _ in batches(rank, 3):
        wrapped.zero_grad()
        (wrapped(x).sum() * 0).backward()
        assert all(not p.grad.any() for p in wrapped.parameters())
    before = float(nn.functional.mse_loss(wrapped(x), batches(rank, 3)[-1][1]).detach())
    train(wrapped, batches(rank, 30) + batches(rank, 30))
    after = float(nn.functional.mse_loss(wrapped(x), batches(rank, 3)[-1][1]).detach())
    return {"before": before, "after": after, "difference": difference(flat(wrapped)), "state": remembered(state)}


def remembered(state: lr.LowRankCommState) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (memory.right.clone(), memory.error.clone()) for name, memory in state.memories.items()}


def non_finite(rank: int) -> dict[str, Any]:
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


def halved_scale(rank: int) -> list[float]:
    """The gradient, unscaled, of the step after; without a change of scale and with one."""
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


def through_file(state: dict[str, Tensor], kind: str) -> Any:
    if kind == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(rank: int) -> dict[str, Any]:
    out = {}
    for name, settings in {
        "plain": {"rank": 2},
        "alternate": {"rank": 2, "alternate": True},
        "bf16": {"rank": 2, "error_dtype": torch.bfloat16},
        "int8": {"rank": 2, "error_dtype": torch.int8, "wire": torch.int8},
        "budget": {"rank": lr.Budget(bytes=3000)},
        "energy": {"rank": lr.Energy(0.8)},
        "refresh": {"rank": 2, "refresh": 4},
        "buckets without factors": {"rank": 2, "saving": 4.0, "wire": torch.bfloat16},
        "integers, buckets without factors": {"rank": 2, "saving": 4.0, "wire": torch.int8},
    }.items():
        cap = 0.001 if "buckets" in name else 0.005
        model = made()
        wrapped, state = wrap(model, settings, bucket_cap_mb=cap)
        train(wrapped, batches(rank, 9))
        weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, state.state_dict()
        train(wrapped, batches(rank, 9, 9))
        for kind in ("torch", "safetensors"):
            again = made()
            again.load_state_dict(weights)
            rewrapped, state = wrap(again, settings, bucket_cap_mb=cap)
            state.load_state_dict(through_file(kept, kind))
            train(rewrapped, batches(rank, 9, 9))
            out[f"{name}, {kind}"] = torch.equal(flat(wrapped), flat(rewrapped))
    return out


def sharded_checkpoint(rank: int) -> dict[str, Any]:
    """torch.distributed.checkpoint: one folder for all processes."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model = made()
    wrapped, state = wrap(model, {"rank": 2})
    train(wrapped, batches(rank, 9))
    weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, state.state_dict()
    dcp.save(kept, checkpoint_id=folder[0])
    train(wrapped, batches(rank, 9, 9))
    again = made()
    again.load_state_dict(weights)
    rewrapped, state = wrap(again, {"rank": 2})
    found = state.state_dict()
    dcp.load(found, checkpoint_id=folder[0])
    state.load_state_dict(found)
    own = state.memories["middle.weight"].error
    same = torch.equal(own, kept[f"process{rank}.error.middle.weight"])
    train(rewrapped, batches(rank, 9, 9))
    return {
        "own_error": same,
        "errors_differ": difference(own) > 0,
        "same": torch.equal(flat(wrapped), flat(rewrapped)),
    }


def frozen_on_resume(rank: int) -> float:
    model = made()
    wrapped, state = wrap(model, {"rank": 2})
    train(wrapped, batches(rank, 5))
    kept = state.state_dict()
    model.middle.requires_grad_(False)
    wrapped, state = wrap(model, {"rank": 2})
    state.load_state_dict(kept)
    train(wrapped, batches(rank, 5, 5))
    return difference(flat(wrapped))


def refused(rank: int) -> dict[str, str]:
    """Message by reason; nothing is loaded."""
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 3))
    kept = state.state_dict()
    _, nameless = wrap(made(), {"rank": 2}, hook=False)
    nameless.model = None
    strange = {key.replace("middle", "centre"): tensor for key, tensor in kept.items()}
    _, wide = wrap(made(lambda: Net(40)), {"rank": 2}, hook=False)
    _, higher = wrap(made(), {"rank": 3}, hook=False)
    _, fine = wrap(made(), {"rank": 2}, hook=False)
    out = {}
    for reason, (target, given) in {
        "names": (fine, strange),
        "shapes": (wide, kept),
        "ranks": (higher, kept),
        "processes": (fine, kept | {"processes": torch.tensor(4)}),
        "other": (fine, {k.replace(f"process{rank}.", f"process{1 - rank}."): v for k, v in kept.items()}),
        "empty": (fine, {}),
        "nameless": (nameless, kept),
    }.items():
        try:
            target.load_state_dict(given)
        except lr.LowRankError as error:
            out[reason] = str(error)
        assert target.step == 0
        assert not target.memories
    try:
        nameless.state_dict()
    except lr.LowRankError as error:
        out["save"] = str(error)
    return out


def merged(rank: int) -> dict[str, Any]:
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 5))
    own = state.state_dict()
    states: list[Any] = [None, None]
    dist.all_gather_object(states, own)
    together = lr.merge_comm_states(states)
    mean = own[f"process{rank}.error.first.weight"].clone()
    dist.all_reduce(mean)
    _, new = wrap(made(), {"rank": 2}, hook=False)
    new.load_state_dict(together)
    try:
        lr.merge_comm_states(states[:1])
        message = ""
    except lr.LowRankError as error:
        message = str(error)
    return {
        "mean": torch.allclose(together["error.first.weight"], mean / 2),
        "loaded": torch.equal(new.memories["first.weight"].error, together["error.first.weight"]),
        "step": new.step,
        "missing": message,
    }


def half_precision(rank: int) -> dict[str, Any]:
    out = {}
    for dtype in (torch.bfloat16, torch.float16):
        wrapped, state = wrap(made().to(dtype), {"rank": 4})
        train(wrapped, [(x.to(dtype), y.to(dtype)) for x, y in batches(rank, 5)])
        memory = state.memories["middle.weight"]
        basis = memory.basis(5, left=False)[0]
        out[str(dtype)] = {
            "dtype": str(memory.right.dtype),
            "orthogonality": float((basis.mT @ basis - torch.eye(4)).abs().max()),
            "difference": difference(flat(wrapped)),
            "gradient": str(wrapped.module.middle.weight.grad.dtype),
        }
    return out


def bf16_wire(rank: int) -> dict[str, Any]:
    wrapped, _ = wrap(made(), {**FULL, "wire": torch.bfloat16})
    plain, _ = wrap(made(), None)
    x, y = batches(rank, 1)[0]
    for model in (wrapped, plain):
        nn.functional.mse_loss(model(x), y).backward()
    pairs = zip(wrapped.parameters(), plain.parameters(), strict=True)
    return {"error": max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)}


def parcels(rank: int) -> dict[str, Any]:
    """By wire: what came back, the mean of what processes say they put in, and the true mean."""
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
        shares = torch.cat([share.flatten() for share in averaged.contributions])
        dist.all_reduce(shares)
        got = torch.cat([tensor.flatten() for tensor in (*factors, *whole)])
        out[str(wire)] = {
            "got": got,
            "true": true / 2,
            "shares": shares / 2,
            "factors": shares.numel(),
            "difference": difference(got),
            "sent": averaged.sent,
        }
    bad = torch.ones(1, 4, 40)
    if rank == 1:
        bad[0, 2, 39] = torch.inf
    before = bad.clone()
    averaged = Exchange(collectives, torch.int8).average_([bad], [torch.ones(3)], [0])
    return out | {"bad": (averaged.finite, torch.equal(bad, before))}


def budget(rank: int) -> dict[str, Any]:
    """Bytes of each step after the first one, which is sent whole; and what cannot be."""
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
        layers = {name: layer["rank"] for name, layer in state.stats()["layers"].items()}
        out[name] = {"whole": whole, "step": (state.stats()["bytes_sent"] - whole) / 2, "ranks": layers}
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
    out["fraction later"] = sorted(state.memories)
    wrapped, _ = wrap(made(), {"rank": lr.Budget(bytes=100)})
    out["small"] = caught(lambda rank: train(wrapped, batches(rank, 1)), rank)["error"]
    return out


def bad_settings(rank: int) -> dict[str, str]:
    wrong: dict[str, dict[str, Any]] = {
        "rank": {"rank": 0},
        "budget": {"rank": lr.Budget(params=0.5)},
        "of": {"rank": lr.Budget(bytes=0.5, of="planned")},
        "start_step": {"start_step": -1},
        "refresh": {"refresh": 0},
        "local_iterations": {"local_iterations": True},
        "wire": {"wire": torch.float64},
        "error_dtype": {"error_dtype": torch.float16},
        "fallback": {"fallback": torch.int8},
        "saving": {"saving": 0},
        "scaler": {"scaler": 2.0},
    }
    out = {}
    for name, settings in wrong.items():
        try:
            lr.LowRankCommState(**settings)
        except lr.LowRankError as error:
            out[name] = str(error)
    return out


def overflowing_wire(rank: int) -> dict[str, Any]:
    """Factors beyond what fp16 holds go out again in fp32."""
    wrapped, state = wrap(made(), {"rank": 2, "wire": torch.float16})
    alone, _ = wrap(made(), {"rank": 2})
    x, y = batches(rank, 1)[0]
    for model in (wrapped, alone):
        (nn.functional.mse_loss(model(x), y) * 1e7).backward()
    pairs = zip(wrapped.parameters(), alone.parameters(), strict=True)
    off = max(float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs)
    return {"off": off, "compressed": sorted(state.memories)}


def unused_parameter_is_owed(rank: int) -> dict[str, float]:
    return {
        "rank 1": conserved(rank, {"rank": 1}, branch=True),
        "alternate": conserved(rank, {"rank": 1, "alternate": True}, branch=True),
    }


def fallback_pays_out(rank: int) -> dict[str, Any]:
    model, alone = made(), made()
    wrapped, state = wrap(model, {"rank": 2, "fallback": True})
    for _ in range(fallback.STEPS):
        state.fallback._seconds[False].append(1.0)
    sums: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    owed = 0.0
    for step, (x, y) in enumerate(batches(rank, 6)):
        if step == 4:
            state.fallback.compress = False
            owed = max(float(memory.error.abs().max()) for memory in state.memories.values())
        for net, inner, total in ((wrapped, model, sums), (alone, alone, true)):
            net.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            for name, p in inner.named_parameters():
                total[name] = total.get(name, 0) + p.grad.clone()
    lost = 0.0
    for name, total in true.items():
        dist.all_reduce(total)
        lost = max(lost, float((sums[name] - total / 2).norm() / (total / 2).norm()))
    return {"owed": owed, "lost": lost, "left": sorted(state.memories)}


def fallback_in_half(rank: int) -> dict[str, Any]:
    """What is sent whole has half the bytes, on every way to it."""
    out: dict[str, Any] = {}
    for name, compress in {"measuring": None, "chosen": False}.items():
        wrapped, state = wrap(made(), {"rank": 2, "fallback": torch.float16})
        state.fallback.compress = compress
        train(wrapped, batches(rank, 3))
        out[name] = state.stats()["ratio"]
        out[f"{name}, difference"] = difference(flat(wrapped))
    _, fresh = wrap(made(), {"rank": 2, "fallback": torch.float16}, hook=False)
    fresh.load_state_dict(state.state_dict())
    return out | {"kept": fresh.fallback.compress}


def sharded_checkpoint_of_a_rule(rank: int) -> str:
    """A fresh state has no tensors to load into: said, not passed over."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    wrapped, state = wrap(made(), {"rank": lr.Energy(0.8)})
    train(wrapped, batches(rank, 3))
    dcp.save(state.state_dict(), checkpoint_id=folder[0])
    _, fresh = wrap(made(), {"rank": lr.Energy(0.8)})
    found = fresh.state_dict()
    dcp.load(found, checkpoint_id=folder[0])
    try:
        fresh.load_state_dict(found)
    except lr.LowRankError as error:
        return str(error)
    return ""


def looking_changes_nothing(rank: int) -> dict[str, bool]:
    """One process asks for its state before the first step, the other does not."""
    _, state = wrap(made(), {"rank": 2, "start_step": 3})
    keys = set(state.state_dict()) if rank == 0 else set()
    return {"memories": not state.memories, "keys": rank == 1 or "right.middle.weight" in keys}


def own_errors(rank: int) -> list[float]:
    """How much of each error lies in the directions just paid out: taking off the own share leaves nothing."""
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 9))
    memories = state.memories.values()
    return [float((m.last_factors[0].mT @ m.error).norm() / m.error.norm()) for m in memories]


def local_iterations(rank: int) -> dict[str, list[float]]:
    """What the first gradient misses; both processes have the same one, so that their own steps are the mean's."""
    x, y = batches(0, 1)[0]
    plain, _ = wrap(made(), None)
    nn.functional.mse_loss(plain(x), y).backward()
    out = {}
    for iterations in (0, 1, 2):
        wrapped, state = wrap(made(), {"rank": 2, "local_iterations": iterations})
        nn.functional.mse_loss(wrapped(x), y).backward()
        pairs = zip(wrapped.module.named_parameters(), plain.parameters(), strict=True)
        missed = [float((p.grad - q.grad).norm() / q.grad.norm()) for (n, p), q in pairs if n in state.memories]
        out[str(iterations)] = missed
    return out


def foreign_parameter(rank: int) -> str:
    wrapped, _ = wrap(made(), {"state": lr.LowRankCommState(rank=2, model=made())})
    x, y = batches(rank, 1)[0]
    try:
        nn.functional.mse_loss(wrapped(x), y).backward()
    except Exception as error:
        return str(error)
    return ""


def sparse_gradients(rank: int) -> dict[str, Any]:
    """Beside compressed ones, under every way to find ranks and to send: equal to those of plain DDP at step one."""
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
            state.fallback.compress = False
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
            "compressed": sorted(state.memories),
            "difference": difference(flat(wrapped)),
            "same keys": set(fresh.state_dict()) == set(state.state_dict()),
        }
        fresh.load_state_dict(state.state_dict())
    return out


def rules(rank: int) -> dict[str, bool]:
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


def units(rank: int) -> dict[str, Any]:
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
            for x, y in batches(rank, 5):
                wrapped.zero_grad()
                (nn.functional.mse_loss(wrapped(x), y) * scale).backward()
                found[scale].append(torch.cat([p.grad.flatten() / scale for p in wrapped.parameters()]))
            ranks[scale] = {key: memory.rank for key, memory in state.memories.items()}
            residuals = [layer["residual"] for layer in state.stats()["layers"].values()]
            assert all(0 < residual < math.inf for residual in residuals)
        plain = found.pop(1.0)
        off = {
            scale: max(float((a - b).norm() / b.norm()) for a, b in zip(grads, plain, strict=True))
            for scale, grads in found.items()
        }
        out[name] = {"off": off, "ranks": [ranks[scale] == ranks[1.0] != {} for scale in off]}
    return out


def full_rank_alternate(rank: int) -> float:
    """One product with a square orthonormal basis loses nothing."""

    def square() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8, bias=False))

    weights = []
    for settings in (None, {"rank": 32, "saving": 0.5, "alternate": True}):
        wrapped, _ = wrap(made(square), settings)
        train(wrapped, batches(rank, 50))
        weights.append(flat(wrapped))
    return float((weights[0] - weights[1]).abs().max() / weights[0].abs().max())


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        many_buckets,
        everything_compressed,
        zero_gradient,
        non_finite,
        halved_scale,
        resume,
        sharded_checkpoint,
        frozen_on_resume,
        refused,
        merged,
        half_precision,
        bf16_wire,
        parcels,
        budget,
        bad_settings,
        overflowing_wire,
        unused_parameter_is_owed,
        fallback_pays_out,
        full_rank_alternate,
        foreign_parameter,
        fallback_in_half,
        sharded_checkpoint_of_a_rule,
        looking_changes_nothing,
        own_errors,
        local_iterations,
        sparse_gradients,
        units,
        rules,
    )
}


def made_too_early() -> tuple[lr.LowRankCommState, list[str]]:
    """A state without a process group, and what it says when it is asked for what it does not know."""
    state = lr.LowRankCommState(rank=2, model=made())
    said = []
    for call in (state.state_dict, lambda: state.load_state_dict({})):
        try:
            call()
        except lr.LowRankError as error:
            said.append(str(error))
    return state, said


def early(rank: int, prepared: tuple[lr.LowRankCommState, list[str]]) -> dict[str, Any]:
    """It then does what one that is made in time does."""
    state, said = prepared
    assert state.model is not None
    first, _ = wrap(state.model, {"state": state})
    second, other = wrap(made(), {"rank": 2})
    for wrapped in (first, second):
        train(wrapped, batches(rank, 5))
    kept, expected = state.state_dict(), other.state_dict()
    same = kept.keys() == expected.keys() and all(torch.equal(kept[key], expected[key]) for key in kept)
    return {"said": said, "apart": float((flat(first) - flat(second)).abs().max()), "same": same}


def lost_process(rank: int) -> list[Any]:
    """One process is late, then gone: what the other sees, and after how many seconds."""
    out = []
    for trouble in ("late", "gone"):
        wrapped, _ = wrap(made(), {"rank": 2, "timeout": timedelta(seconds=2)})
        train(wrapped, batches(rank, 3))
        dist.barrier()
        if rank == 1 and trouble == "gone":
            os._exit(0)
        if rank == 1:
            time.sleep(3.5)
        start = time.monotonic()
        case = caught(lambda rank: train(wrapped, batches(rank, 3, 3)), rank)  # noqa: B023
        out.append((time.monotonic() - start, case and case["error"]))
        if trouble == "late":
            dist.barrier()
    return out


def three(rank: int) -> dict[str, Any]:
    """More processes than blocks of some tensors, and not a power of two."""
    out: dict[str, Any] = {}
    for name, settings in {"int8": {"rank": 1, "wire": torch.int8}, "fp32": {"rank": 1}}.items():
        wrapped, _ = wrap(made(), settings)
        train(wrapped, batches(rank, 20))
        out[name] = {"difference": difference(flat(wrapped)), "weights": flat(wrapped)}
    return out | {"conserved": conserved(rank, {"rank": 1, "wire": torch.int8})}


def alone(rank: int) -> dict[str, Any]:
    """One process."""
    plain, _ = wrap(made(SparseWords), None)
    wrapped, state = wrap(made(SparseWords), {"rank": 2})
    for model in (plain, wrapped):
        x, y = batches(rank, 1)[0]
        nn.functional.mse_loss(model(x), y).backward()
    words = [model.module.words.weight.grad for model in (plain, wrapped)]
    return {"off": float((words[0].to_dense() - words[1].to_dense()).abs().max()), "memories": sorted(state.memories)}


def nodes(rank: int) -> dict[str, Any]:
    """Four processes, two nodes of two."""
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    groups = {"process_group": across, "node_group": within}
    out = []
    whole, _ = wrap(made(SparseWords), None)
    parted, _ = wrap(made(SparseWords), {"rank": 2, **groups})
    for model in (whole, parted):
        x, y = batches(rank, 1)[0]
        nn.functional.mse_loss(model(x), y).backward()
    words = [model.module.words.weight.grad.to_dense() for model in (whole, parted)]
    for settings in (None, {"rank": 2, **groups}, {**FULL, **groups}, {"rank": lr.Energy(0.9), **groups}):
        wrapped, state = wrap(made(), settings)
        train(wrapped, batches(rank, 50 if settings and settings["rank"] == 2 else 20))
        out.append((flat(wrapped), difference(flat(wrapped)), state and state.stats()["ratio"]))
    return {
        "differences": [difference for _, difference, _ in out],
        "to_plain": float((out[2][0] - out[0][0]).abs().max() / out[0][0].abs().max()),
        "ratio": out[1][2],
        "sparse": float((words[0] - words[1]).abs().max() / words[0].abs().max()),
    }
