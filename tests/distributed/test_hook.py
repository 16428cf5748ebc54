"""Every way to train with DistributedDataParallel: processes stay equal, and full rank is plain DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import lowrank_layers as lr
from tests.processes import run_processes

from .cases import FULL, batches, difference, flat, layers, made, train, wrap
from .models import Checkpointed, Experts, Net, Picture, Scaled, SparseWords, Words

EXACT, TIGHT = 0.0, 1e-5
STEPS = 24
REPEATED = 20


def plainly(kind: Callable[[], nn.Module], **ddp: Any) -> Callable[[int, dict[str, Any] | None], Tensor]:
    def way(rank: int, settings: dict[str, Any] | None) -> Tensor:
        wrapped, _ = wrap(made(kind), settings, **ddp)
        train(wrapped, batches(rank, STEPS))
        return flat(wrapped)

    return way


def unused(rank: int, settings: dict[str, Any] | None) -> Tensor:
    """A branch that is used in one process, in both, or in none."""
    wrapped, _ = wrap(made(), settings, find_unused_parameters=True)
    for step, pair in enumerate(batches(rank, STEPS)):
        train(wrapped, [pair], branch=step % 4 == 0 or (step % 4 == 1 and rank == 0))
    return flat(wrapped)


def joined(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, _ = wrap(made(), settings)
    with Join([wrapped]):
        train(wrapped, batches(rank, STEPS - 8 * rank))
    return flat(wrapped)


def accumulated(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, _ = wrap(made(), settings)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02)
    for step, (x, y) in enumerate(batches(rank, STEPS)):
        with wrapped.no_sync() if step % 3 else contextlib.nullcontext():
            nn.functional.mse_loss(wrapped(x), y).backward()
        if step % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return flat(wrapped)


def late(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, state = wrap(made(), settings, hook=False)
    train(wrapped, batches(rank, 5))
    if state is not None:
        wrapped.register_comm_hook(state, lr.low_rank_hook)
    train(wrapped, batches(rank, STEPS - 5, 5))
    return flat(wrapped)


def frozen(rank: int, settings: dict[str, Any] | None) -> Tensor:
    """A layer frozen, then trained again; buckets of another size each time; one state."""
    model = made()
    state = None if settings is None else lr.LowRankCommState(model=model, **settings)
    for turn, (trains, cap) in enumerate([(True, 0.005), (False, 0.02), (True, 25)]):
        model.middle.requires_grad_(trains)
        wrapped, _ = wrap(model, None if state is None else {"state": state}, bucket_cap_mb=cap)
        train(wrapped, batches(rank, 9, 9 * turn))
    return flat(model)


WAYS: dict[str, Callable[[int, dict[str, Any] | None], Tensor]] = {
    "many_buckets": plainly(Net),
    "one_bucket": plainly(Net, bucket_cap_mb=25),
    "find_unused_parameters": unused,
    "static_graph": plainly(Net, static_graph=True),
    "gradient_as_bucket_view": plainly(Net, gradient_as_bucket_view=True),
    "activation_checkpointing": plainly(Checkpointed),
    "0_dim_parameter": plainly(Scaled),
    "embedding": plainly(Words),
    "sparse_gradients": plainly(SparseWords),
    "sparse_gradients_as_bucket_view": plainly(SparseWords, gradient_as_bucket_view=True, static_graph=True),
    "channels_last": plainly(Picture),
    "experts": plainly(Experts),
    "join": joined,
    "no_sync": accumulated,
    "late_registration": late,
    "frozen_and_changed_buckets": frozen,
}


def case_ways(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, way in WAYS.items():
        plain, low, full = way(rank, None), way(rank, {"rank": 2}), way(rank, FULL)
        integers = way(rank, {"rank": 2, "wire": torch.int8, "error_dtype": torch.int8})
        scale = float(plain.abs().max())
        out[name] = {
            "integers": difference(integers),
            "integers_to_low": float((integers - low).abs().max()) / scale,
            "low": difference(low),
            "full": difference(full),
            "to_plain": float((full - plain).abs().max()) / scale,
            "low_to_plain": float((low - plain).abs().max()) / scale,
        }
    return out


@pytest.mark.parametrize("way", WAYS)
def test_ways(seen, way):
    for process in seen:
        assert process[way]["low"] == process[way]["full"] == process[way]["integers"] == EXACT
        assert 0 < process[way]["integers_to_low"] < 0.2
        assert process[way]["to_plain"] < TIGHT
        assert process[way]["low_to_plain"] > 0, "nothing was compressed"


def case_many_buckets(rank: int) -> list[float]:
    out = []
    for _ in range(REPEATED):
        wrapped, _ = wrap(made(), {"rank": 2})
        train(wrapped, batches(rank, 4))
        out.append(difference(flat(wrapped)))
    return out


def test_many_buckets(seen):
    assert seen[0] == seen[1] == [EXACT] * REPEATED


def case_everything_compressed(rank: int) -> dict[str, Any]:
    """One bucket of several matrices."""
    wrapped, state = wrap(made(), {"rank": 1}, bucket_cap_mb=25)
    train(wrapped, batches(rank, 3))
    return {"layers": layers(state), "difference": difference(flat(wrapped))}


def test_everything_compressed(seen):
    assert seen[0]["layers"] == ["branch.weight", "first.weight", "last.weight", "middle.weight"]
    assert seen[0]["difference"] == EXACT


def case_half_precision(rank: int) -> dict[str, Any]:
    out = {}
    for dtype in (torch.bfloat16, torch.float16):
        wrapped, state = wrap(made().to(dtype), {"rank": 4})
        train(wrapped, [(x.to(dtype), y.to(dtype)) for x, y in batches(rank, 5)])
        left, right = state.factors(wrapped.module.middle.weight)
        out[str(dtype)] = {
            "dtypes": {str(left.dtype), str(right.dtype)},
            "orthogonality": float((left.mT @ left - torch.eye(4)).abs().max()),
            "difference": difference(flat(wrapped)),
            "gradient": str(wrapped.module.middle.weight.grad.dtype),
        }
    return out


def test_half_precision(seen):
    for process in seen:
        for dtype, got in process.items():
            assert got["dtypes"] == {"torch.float32"}
            assert got["gradient"] == dtype
            assert got["orthogonality"] < 1e-6
            assert got["difference"] == EXACT


def case_foreign_parameter(rank: int) -> str:
    wrapped, _ = wrap(made(), {"state": lr.LowRankCommState(rank=2, model=made())})
    x, y = batches(rank, 1)[0]
    try:
        nn.functional.mse_loss(wrapped(x), y).backward()
    except Exception as error:
        return str(error)
    return ""


def test_foreign_parameter(seen):
    assert all("not in model=" in message for message in seen)


def made_too_early() -> tuple[lr.LowRankCommState, list[str]]:
    """A state made before the process group, and the errors of saving and loading it then."""
    state = lr.LowRankCommState(rank=2, model=made())
    said = []
    for call in (state.state_dict, lambda: state.load_state_dict({})):
        try:
            call()
        except lr.LowRankError as error:
            said.append(str(error))
    return state, said


def early(rank: int, prepared: tuple[lr.LowRankCommState, list[str]]) -> dict[str, Any]:
    """Training with that state equals training with one that is made later."""
    state, said = prepared
    assert state.model is not None
    first, _ = wrap(state.model, {"state": state})
    second, other = wrap(made(), {"rank": 2})
    for wrapped in (first, second):
        train(wrapped, batches(rank, 5))
    kept, expected = state.state_dict(), other.state_dict()
    same = kept.keys() == expected.keys() and all(torch.equal(kept[key], expected[key]) for key in kept)
    return {"said": said, "apart": float((flat(first) - flat(second)).abs().max()), "same": same}


def test_a_state_from_before_the_process_group(tmp_path):
    for process in run_processes(early, tmp_path, before=made_too_early):
        assert len(process["said"]) == 2
        assert all("call dist.init_process_group first" in message for message in process["said"])
        assert process["apart"] == EXACT
        assert process["same"]


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
        train(wrapped, batches(rank, 20))
        out.append((flat(wrapped), difference(flat(wrapped)), state and state.stats()["ratio"]))
    return {
        "differences": [difference for _, difference, _ in out],
        "to_plain": float((out[2][0] - out[0][0]).abs().max() / out[0][0].abs().max()),
        "ratio": out[1][2],
        "sparse": float((words[0] - words[1]).abs().max() / words[0].abs().max()),
    }


def test_two_nodes_of_two(tmp_path):
    for process in run_processes(nodes, tmp_path, world=4):
        assert process["differences"] == [EXACT] * 4
        assert process["to_plain"] < TIGHT
        assert process["ratio"] > 5
        assert process["sparse"] < TIGHT
