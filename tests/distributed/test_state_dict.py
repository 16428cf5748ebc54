"""States are saved, loaded, merged and refused; a resumed run equals an uninterrupted one."""

from __future__ import annotations

import io
import tempfile
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import lowrank_layers as lr

from .cases import batches, difference, errors, flat, layers, made, train, wrap
from .models import Net

EXACT = 0.0


def through_file(state: dict[str, Tensor], kind: str) -> Any:
    if kind == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def case_resume(rank: int) -> dict[str, Any]:
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
        train(wrapped, batches(rank, 6))
        weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, state.state_dict()
        train(wrapped, batches(rank, 6, 6))
        again = made()
        again.load_state_dict(weights)
        rewrapped, state = wrap(again, settings, bucket_cap_mb=cap)
        state.load_state_dict(through_file(kept, "torch"))
        train(rewrapped, batches(rank, 6, 6))
        out[name] = torch.equal(flat(wrapped), flat(rewrapped))
        other = through_file(kept, "safetensors")
        same = [torch.equal(other[key], tensor) and other[key].dtype == tensor.dtype for key, tensor in kept.items()]
        out[f"{name}, safetensors"] = all(same) and other.keys() == kept.keys()
    return out


def test_resume(seen):
    assert all(same for process in seen for same in process.values()), seen


def case_sharded_checkpoint(rank: int) -> dict[str, Any]:
    """torch.distributed.checkpoint: one folder for all processes."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model = made()
    wrapped, state = wrap(model, {"rank": 2})
    train(wrapped, batches(rank, 6))
    weights, kept = {k: v.clone() for k, v in model.state_dict().items()}, state.state_dict()
    dcp.save(kept, checkpoint_id=folder[0])
    train(wrapped, batches(rank, 6, 6))
    again = made()
    again.load_state_dict(weights)
    rewrapped, state = wrap(again, {"rank": 2})
    found = state.state_dict()
    dcp.load(found, checkpoint_id=folder[0])
    state.load_state_dict(found)
    own = errors(state)["middle.weight"]
    same = torch.equal(own, kept[f"process{rank}.error.middle.weight"])
    train(rewrapped, batches(rank, 6, 6))
    return {
        "own_error": same,
        "errors_differ": difference(own) > 0,
        "same": torch.equal(flat(wrapped), flat(rewrapped)),
    }


def test_sharded_checkpoint(seen):
    for process in seen:
        assert process == {"own_error": True, "errors_differ": True, "same": True}


def case_sharded_checkpoint_of_a_rule(rank: int) -> str:
    """A fresh state has no tensors to load into, which is an error."""
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


def test_sharded_checkpoint_of_a_rule(seen):
    assert all("this state has no ranks" in message for message in seen)


def case_frozen_on_resume(rank: int) -> float:
    model = made()
    wrapped, state = wrap(model, {"rank": 2})
    train(wrapped, batches(rank, 5))
    kept = state.state_dict()
    model.middle.requires_grad_(False)
    wrapped, state = wrap(model, {"rank": 2})
    state.load_state_dict(kept)
    train(wrapped, batches(rank, 5, 5))
    return difference(flat(wrapped))


def test_frozen_on_resume(seen):
    assert seen == [EXACT, EXACT]


def case_refused(rank: int) -> dict[str, str]:
    """Errors by reason; nothing is loaded."""
    wrapped, state = wrap(made(), {"rank": 2})
    train(wrapped, batches(rank, 3))
    kept = state.state_dict()
    nameless = lr.LowRankCommState(rank=2)
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
        assert (target.stats()["steps"], layers(target)) == (0, [])
    try:
        nameless.state_dict()
    except lr.LowRankError as error:
        out["save"] = str(error)
    return out


def test_refused(seen):
    for rank, process in enumerate(seen):
        assert "'centre.weight' is not in the model" in process["names"]
        assert "'first.weight' is (1, 48, 32) here and (1, 48, 40)" in process["shapes"]
        assert "has rank 2 here and rank=3" in process["ranks"]
        assert "4 processes, expected one of 2" in process["processes"]
        assert "lr.merge_comm_states" in process["processes"]
        assert f"no error of process {rank}" in process["other"]
        assert "no 'step'" in process["empty"]
        assert "model=" in process["nameless"]
        assert "model=" in process["save"]


def case_merged(rank: int) -> dict[str, Any]:
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
        "loaded": torch.equal(errors(new)["first.weight"], together["error.first.weight"]),
        "step": new.stats()["steps"],
        "missing": message,
    }


def test_merged(seen):
    for process in seen:
        assert process["mean"]
        assert process["loaded"]
        assert process["step"] == 5
        assert "process1.error.first.weight" in process["missing"]


@pytest.mark.parametrize("steps", [[], [1, 2], [None]])
def test_states_that_cannot_be_merged(steps):
    two = torch.tensor(2)
    states = [{} if step is None else {"step": torch.tensor(step), "processes": two} for step in steps]
    with pytest.raises(lr.LowRankError, match="merge_comm_states: got"):
        lr.merge_comm_states(states)


def case_looking_changes_nothing(rank: int) -> dict[str, bool]:
    """One process asks for its state before the first step, the other does not."""
    _, state = wrap(made(), {"rank": 2, "start_step": 3})
    keys = set(state.state_dict()) if rank == 0 else set()
    return {"layers": layers(state) == [], "keys": rank == 1 or "right.middle.weight" in keys}


def test_looking_changes_nothing(seen):
    assert seen == [{"layers": True, "keys": True}] * 2
