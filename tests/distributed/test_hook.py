"""The gradient hook between processes: what breaks torch's own, every way to train, checkpoints, lost processes."""

import math
import re
import subprocess
import sys

import pytest
import torch

import lowrank_layers as lr
from tests.processes import Hang, run_processes

from . import hook_cases, hook_worker, torch_cases

EXACT, TIGHT = 0.0, 1e-5


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """What all processes saw in all cases; starting processes takes longer than a case."""
    return run_processes(hook_worker.run_all, tmp_path_factory.mktemp("ours"), seconds=240)


@pytest.fixture
def seen(everywhere, request):
    """Of the case that a test is named after."""
    name = request.node.originalname.removeprefix("test_")
    results = [process[name] for process in everywhere]
    for result in results:
        assert not (isinstance(result, dict) and "trace" in result), result["trace"]
    return results


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """What torch's hook did in the same places."""
    return run_processes(torch_cases.run_together, tmp_path_factory.mktemp("torch"))


@pytest.mark.parametrize("way", hook_worker.WAYS)
def test_ways(seen, way):
    for process in seen:
        assert process[way]["low"] == process[way]["full"] == process[way]["integers"] == EXACT
        assert 0 < process[way]["integers_to_low"] < 0.2
        assert process[way]["to_plain"] < TIGHT
        assert process[way]["low_to_plain"] > 0, "nothing was compressed"


@pytest.mark.parametrize("setting", hook_worker.SETTINGS)
def test_settings(seen, setting):
    # vectors have 16 bits on a wire of int8
    lost = {"wire_bf16": 1e-2, "wire_fp16": 1e-2, "error_dtype_bf16": 1e-2, "error_dtype_int8": 5e-2}
    lost |= {"wire_int8": 1e-4, "wire_int8_alternate": 1e-4, "fallback_fp16": 1e-2}
    for process in seen:
        got = process[setting]
        assert got["difference"] == EXACT
        assert got["loss"] < 32  # 36 at the start
        if setting == "no_error_feedback":
            assert got["conserved"] > 0.1
        else:
            assert got["conserved"] < lost.get(setting, TIGHT)
        assert got["stats"]["steps"] == hook_worker.STEPS
        assert got["stats"]["ratio"] > (1.0 if setting.startswith("fallback") else 1.5)


def test_many_buckets(seen):
    assert seen[0] == seen[1] == [EXACT] * 20


def torch_breaks(case, folder):
    """How, or None."""
    try:
        differences = run_processes(case, folder, seconds=15, timeout=5)
    except Hang:
        return "hangs"
    except Exception as error:
        return str(error).strip().splitlines()[-1]
    return None if differences == [EXACT] * 2 else f"differs by {differences}"


@pytest.mark.parametrize("case", [torch_cases.many_buckets, torch_cases.unused])
def test_torch_breaks_with_buckets_on_gloo(case, tmp_path, record_property):
    how = torch_breaks(case, tmp_path)
    record_property("torch", how)
    assert how is not None


def test_everything_compressed(seen, peer):
    assert seen[0]["layers"] == ["branch.weight", "first.weight", "last.weight", "middle.weight"]
    assert seen[0]["difference"] == EXACT
    assert "AssertionError" in peer[0]["batched"]["error"]


def test_zero_gradient(seen, peer):
    for process in seen:
        assert math.isfinite(process["after"])
        assert process["after"] < process["before"]
        assert process["difference"] == EXACT
    assert peer[0]["zero_gradient"] is False


def test_non_finite(seen, peer):
    for process in seen:
        assert process["skipped"]
        assert process["scale"] == 512
        assert process["before"].keys() == process["after"].keys() != set()
        for name, tensors in process["before"].items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, process["after"][name], strict=True)), name
        assert process["moved"]
        assert process["finite"]
        assert process["difference"] == EXACT
    assert peer[0]["non_finite"] == [True] * 4 + [False] * 5


def test_halved_scale(seen, peer):
    for kept, halved in seen:
        assert halved == pytest.approx(kept, rel=TIGHT)
    kept, halved = peer[0]["halved_scale"]
    assert halved > 1.5 * kept


def test_resume(seen, peer):
    assert all(same for process in seen for same in process.values()), seen
    assert peer[0]["resume"] > 0.5
    assert "Unsupported global" in peer[0]["weights_only"]["error"]


def test_sharded_checkpoint(seen):
    for process in seen:
        assert process == {"own_error": True, "errors_differ": True, "same": True}


def test_frozen_on_resume(seen, peer):
    assert seen == [EXACT, EXACT]
    assert "must match the size" in peer[0]["frozen_on_resume"]["error"]


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


def test_half_precision(seen, peer):
    for process in seen:
        for dtype, got in process.items():
            assert got["dtype"] == "torch.float32"
            assert got["gradient"] == dtype
            assert got["orthogonality"] < 1e-6
            assert got["difference"] == EXACT
    assert peer[0]["half_precision"] > 1e-3


def test_bf16_wire(seen, peer):
    assert 0 < seen[0]["error"] < 1e-2
    assert "BF16" in peer[0]["bf16_wire"]["error"]


def test_scalar_parameter_breaks_torch(peer):
    """Ours: the way 0_dim_parameter."""
    assert "IndexError" in peer[0]["scalar_parameter"]["error"]


@pytest.mark.parametrize("wire", [None, torch.float16, torch.bfloat16, torch.int8])
def test_parcels(seen, wire):
    for process in seen:
        case = process[str(wire)]
        factors = slice(case["factors"])
        assert case["difference"] == EXACT
        near = {None: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.int8: 2e-2}[wire]
        for part in (factors, slice(case["factors"], None)):
            assert float((case["got"] - case["true"])[part].norm() / case["true"][part].norm()) < near
        if wire in (None, torch.int8):
            torch.testing.assert_close(case["shares"], case["got"][factors], rtol=1e-5, atol=1e-5)
    sent = {name: case["sent"] for name, case in seen[0].items() if name != "bad"}
    assert sent["torch.float16"] == sent["None"] / 2
    assert sent["torch.int8"] < 0.35 * sent["None"]


def test_parcels_tell_everywhere_what_is_not_finite_somewhere(everywhere):
    assert [process["parcels"]["bad"] for process in everywhere] == [(False, True)] * 2


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


def test_bad_settings(seen):
    names = "rank budget of start_step refresh local_iterations wire error_dtype fallback saving scaler"
    for process in seen:
        assert set(process) == set(names.split())
        assert all(re.match("(PowerSGDSettings|LowRankCommState): got", message) for message in process.values())
        assert all("expected" in message for message in process.values())


def test_overflowing_wire(seen):
    for process in seen:
        assert process["off"] < TIGHT
        assert process["compressed"]


def test_unused_parameter_is_owed(seen):
    assert all(lost < TIGHT for process in seen for lost in process.values())


def test_fallback_pays_out(seen):
    for process in seen:
        assert process["owed"] > 0
        assert process["lost"] < TIGHT
        assert process["left"] == []


def test_full_rank_alternate(seen):
    assert max(seen) < TIGHT


def test_fallback_in_half(seen):
    for process in seen:
        assert process == {
            "measuring": 2.0,
            "measuring, difference": EXACT,
            "chosen": 2.0,
            "chosen, difference": EXACT,
            "kept": False,
        }


def test_sharded_checkpoint_of_a_rule(seen):
    assert all("this state has no ranks" in message for message in seen)


def test_looking_changes_nothing(seen):
    assert seen == [{"memories": True, "keys": True}] * 2


def test_own_errors(seen):
    assert all(len(parts) == 4 and max(parts) < TIGHT for parts in seen)


def test_local_iterations(seen):
    for process in seen:
        assert len(process["0"]) == 4
        for none, one, two in zip(*process.values(), strict=True):
            assert two <= one < none


def test_rules(seen):
    for process in seen:
        assert len(process) == 10
        assert all(process.values()), process


def test_units(seen):
    """Squares of gradients of 1e18 or 1e-30 are not in fp32."""
    for process in seen:
        for name, got in process.items():
            assert max(got["off"].values()) < 1e-4, (name, got)
            assert all(got["ranks"]), (name, got)


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


def test_sparse_gradients_of_one_process(tmp_path):
    (process,) = run_processes(hook_cases.alone, tmp_path, world=1)
    assert process["off"] == 0
    assert process["memories"] == ["head.weight", "middle.down.weight", "middle.up.weight", "pairs.up.weight"]


def test_a_program_that_ends_in_the_middle_of_a_job_ends_well():
    """Python stops its threads at the end; one that is just then in torch's C++ would abort the program."""
    program = """
import time, torch
from lowrank_layers.distributed.worker_thread import WorkerThread
future = WorkerThread().submit(lambda: torch.ones(1), torch.device("cpu"))
still_running = future.then(lambda done: time.sleep(0.05))
future.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_foreign_parameter(seen):
    assert all("not in model=" in message for message in seen)


def test_a_state_from_before_the_process_group(tmp_path):
    for process in run_processes(hook_cases.early, tmp_path, before=hook_cases.made_too_early):
        assert len(process["said"]) == 2
        assert all("call dist.init_process_group first" in message for message in process["said"])
        assert process["apart"] == EXACT
        assert process["same"]


def test_lost_process(tmp_path):
    """Whoever is left raises within the timeout and says so."""
    first, gone = run_processes(hook_cases.lost_process, tmp_path, seconds=45, together=False)
    assert gone is None
    for seconds, message in first:
        assert seconds < 10
        assert "averaging gradients failed" in message
        assert "start again from a checkpoint" in message


def test_three_processes(tmp_path):
    for process in run_processes(hook_cases.three, tmp_path, world=3):
        assert process["int8"]["difference"] == process["fp32"]["difference"] == EXACT
        assert process["conserved"] < 1e-4
        apart = (process["int8"]["weights"] - process["fp32"]["weights"]).norm() / process["fp32"]["weights"].norm()
        assert 0 < apart < 0.02


def test_two_nodes_of_two(tmp_path):
    for process in run_processes(hook_cases.nodes, tmp_path, world=4):
        assert process["differences"] == [EXACT] * 4
        assert process["to_plain"] < TIGHT
        assert process["ratio"] > 5
        assert process["sparse"] < TIGHT
