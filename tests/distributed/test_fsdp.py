"""FSDP2 with replicas at low rank: two replicas of two shards, all cases in one group of processes."""

import re

import pytest
import torch

from tests.processes import run_processes

from . import fsdp_worker


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each case, a list with one per process."""
    folder = tmp_path_factory.mktemp("fsdp")
    found = run_processes(fsdp_worker.run, folder, world=fsdp_worker.WORLD, seconds=180, timeout=60)
    return {case: [one[case] for one in found] for case in fsdp_worker.CASES}


def worst(got, expected):
    """The greatest difference, relative to the greatest number."""
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] is None] == [name for name in expected if expected[name] is None]
    pairs = [(got[name], expected[name]) for name in got if got[name] is not None]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)


def test_it_learns_as_native_hybrid_sharding_does(results):
    for case in results["curves"]:
        native, low = case["native"], case["low"]
        assert low[0] == pytest.approx(native[0], abs=1e-5)
        drop = native[0] - sum(native[-4:]) / 4
        assert drop > 1
        assert native[0] - sum(low[-4:]) / 4 > 0.9 * drop
        assert case["apart"] == 0.0
        assert case["stats"]["steps"] == len(low)


@pytest.mark.parametrize("way", ["factors", "sent whole", "late"])
def test_full_rank_is_native_hybrid_sharding(results, way):
    for case in results["whole"]:
        parameters, compressed, apart = case["ours"][way]
        assert worst(parameters, case["native"]) < 1e-5
        assert (compressed > 0) == (way == "factors")
        assert apart == 0.0


@pytest.mark.parametrize("way", ["alternate", "rule", "bf16", "bf16 reduced", "int8", "budget", "budget, frozen"])
def test_other_ways_learn_too(results, way):
    for case in results["variants"]:
        losses, apart, steps, ratio = case[way]
        assert sum(losses[-3:]) / 3 < 0.6 * losses[0]
        assert apart == 0.0
        assert steps == len(losses)
        assert ratio > (1.6 if way.startswith("budget") else 1.0), "nothing was saved"


def test_bytes_between_replicas(results):
    for rank, stats in enumerate(results["bytes"]):
        assert stats["ratio"] > 15
        assert {name: layer["rank"] for name, layer in stats["layers"].items()} == {
            f"{name}.weight:shard{rank % 2}": 4 for name in (0, 2)
        }
        assert all(layer["residual"] > 0 for layer in stats["layers"].values())
        shard, biases = 4 * (512 + 512) + 4 * (512 + 1024), 512 + 512
        assert stats["bytes_sent"] == 2 * 4 * (shard + biases + 2)  # a flag a matrix: whether it is zero everywhere


def test_replicas_start_as_the_first(results):
    for case in results["start"]:
        assert case["before"] > 0
        assert case["after"] == 0.0
        assert not case["buffer"].any()


@pytest.mark.parametrize("switch", ["set_requires_gradient_sync", "set_requires_all_reduce"])
def test_micro_batches_are_native_ones(results, switch):
    for case in results["accumulated"]:
        for step in (2, 5):
            assert worst(case[switch, "ours", step], case[switch, "native", step]) < 1e-5


def test_unused_parameters_and_odd_shards(results):
    for case in results["unused"]:
        for step in range(4):
            assert worst(case["ours", step], case["native", step]) < 1e-5
        assert case["ours", 0]["other.weight"] is not None
        assert case["ours", 1]["other.weight"] is None


def test_replicas_may_leave_out_other_parameters_each(results):
    for rank, case in enumerate(results["unused"]):
        assert case["apart"] == 0.0
        # of the one row of the head nothing is saved, and the second shard has none of it
        assert set(case["layers"]) == {f"{name}.weight:shard{rank % 2}" for name in ("conv", "branch", "other")}


def test_a_gradient_that_is_not_finite_passes_and_leaves_nothing(results):
    for case in results["not_finite"]:
        assert case["finite"] == [True, False, True]
        before, at, after = case["errors"]
        assert before.keys() == at.keys()
        assert all(torch.equal(before[name], at[name]) for name in at)
        assert all(error.isfinite().all() for error in after.values())
        assert any(not torch.equal(at[name], after[name]) for name in at)


def test_units_are_reduced_in_one_order_everywhere(results):
    first = results["order"][0]
    assert all(case == first for case in results["order"])
    assert [names.split(".")[0] for names in first["names"][:3]] == ["2", "1", "0"]
    assert first["names"][:3] == first["names"][3:6] == first["names"][6:]
    assert first["steps"] == [2, 11]


REFUSED = {
    "2-d": r"mesh with replicas, expected one of shards alone.*fully_shard\(model, mesh=mesh\[\"shard\"\]\)",
    "plain": "without shards; call fully_shard on it first",
    "part": "'0.weight' is not sharded",
    "world": "expected . alone in both",
    "shards": "expected . alone in both",
    "none": "got replicate_group NoneType",
    "rank": "got rank 0",
    "settings": "has other settings",
    "other model": "has other shapes of parameters",
    "meta": "'0.weight' is on the meta device",
    "newer": "got torch 3.1.0, expected 2.11 to 2.13",
    "older": "got torch 2.10.0, expected 2.11 to 2.13",
    "twice": "got a model with an all-reduce hook",
    "ddp": "expected a LowRankCommState",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(results, what):
    for case in results["refused"]:
        assert case.keys() == REFUSED.keys()
        assert re.search(REFUSED[what], case[what]), case[what]
