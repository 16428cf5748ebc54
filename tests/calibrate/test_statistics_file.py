"""Statistics in a file: the same as in memory, read one layer at a time, and refused where they are damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate import statistics_file

from .merge_cases import Energy, assert_equal, cases, shown

CASES = cases()


def small(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def calibrated(model: nn.Module, loss: object = None) -> lr.Statistics:
    return lr.calibrate(model, [torch.randn(60, 8)], loss or lr.SampledCrossEntropy())


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "stats.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_a_file_holds_them_exactly(name, path):
    model, batches, options = CASES[name]
    stats = lr.calibrate(model, batches, Energy(), **options)
    stats.save(path)
    loaded = lr.Statistics.load(path)
    assert_equal(loaded, stats, tolerance=0.0)
    assert (loaded.other_macs, loaded.mask) == (stats.other_macs, stats.mask)
    assert shown(loaded.example) == shown(stats.example)
    assert_equal(pickle.loads(pickle.dumps(loaded)), stats, tolerance=0.0)
    assert_equal(copy.deepcopy(loaded), stats, tolerance=0.0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_plan_and_weights_are_those_of_the_statistics_in_memory(path):
    model = small()
    stats = calibrated(model)
    stats.save(path)
    loaded = lr.Statistics.load(path)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
    assert list(lr.make_plan(model, lr.Budget(params=0.5), stats=loaded)) == list(plan)
    data = [torch.randn(60, 8)]
    one, other = (lr.factorize_(copy.deepcopy(model), plan, stats=each, data=data) for each in (stats, loaded))
    assert any(isinstance(module, lr.FactoredModule) for module in one.modules())
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_planning_and_factorizing_hold_the_moments_of_one_layer(path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    stats = lr.calibrate(model, [torch.randn(99, 32)], lr.SampledCrossEntropy())
    stats.save(path)
    of_one = 8 * (2 * 32 * 32 + 32) + stats.example.nbytes  # two moments and a mean in float64; the example stays
    alive, most = 0, 0
    read = statistics_file.read_tensor

    def let_go(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def counted(*args: object) -> Tensor:
        nonlocal alive, most
        tensor = read(*args)
        alive, most = alive + tensor.nbytes, max(most, alive + tensor.nbytes)
        weakref.finalize(tensor, let_go, tensor.nbytes)
        return tensor

    monkeypatch.setattr(statistics_file, "read_tensor", counted)
    loaded = lr.Statistics.load(path)
    assert most == stats.example.nbytes == alive
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats=loaded)
    lr.factorize_(model, plan, stats=loaded)
    assert of_one / 2 < most <= of_one
    most = 0
    merged = loaded.merge(loaded)
    assert most == 0
    merged.save(path.with_name("merged.safetensors"))
    assert 0 < most <= of_one


def test_merged_files_add_up_to_the_whole(path):
    model, batches, options = CASES["experts"]
    other = path.with_name("other.safetensors")
    lr.calibrate(model, batches[:1], Energy(), **options).save(path)
    lr.calibrate(model, batches[1:], Energy(), **options).save(other)
    lr.Statistics.load(path).merge(lr.Statistics.load(other)).save(path)
    assert_equal(lr.Statistics.load(path), lr.calibrate(model, batches, Energy(), **options))


def test_shared_moments_are_stored_once(path):
    layer = calibrated(nn.Linear(8, 4))[""]
    shared = lr.Statistics({"q": layer, "k": dataclasses.replace(layer, repeats=2.0)}, samples=60)
    shared.save(path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["k.gradients", "q.gradients", "q.mean", "q.second"]
    loaded = lr.Statistics.load(path)
    assert loaded["q"].inputs is loaded["k"].inputs
    assert torch.equal(loaded["k"].inputs.second, layer.inputs.second)
    assert (loaded["q"].repeats, loaded["k"].repeats) == (1.0, 2.0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_rounds_gradients_and_covariances(path, offset):
    model = small(64)
    stats = lr.calibrate(model, [torch.randn(60, 8) + offset], Energy())
    stats.save(path)
    size = path.stat().st_size
    stats.save(path, dtype=torch.float32)
    assert path.stat().st_size < 0.6 * size
    loaded = lr.Statistics.load(path)
    for name, layer in stats.items():
        own = loaded[name]
        moments = (own.inputs.covariance(), layer.inputs.covariance()), (own.gradients, layer.gradients)
        for got, want in (*moments, (own.inputs.second, layer.inputs.second), (own.inputs.mean, layer.inputs.mean)):
            assert got.dtype == torch.float64
            assert torch.linalg.vector_norm(got - want) <= 2.0**-23 * torch.linalg.vector_norm(want)


def test_float32_keeps_groups_and_the_diagonals_of_embeddings(path):
    for name in ("convolutions", "bags"):
        model, batches, options = CASES[name]
        stats = lr.calibrate(model, batches, Energy(), **options)
        stats.save(path, dtype=torch.float32)
        assert_equal(lr.Statistics.load(path), stats, tolerance=2.0**-23)


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_float32_refuses_what_it_cannot_hold(path, size):
    stats = calibrated(nn.Linear(8, 4))
    stats[""].inputs.mean *= size**0.5
    stats[""].inputs.second *= size
    with pytest.raises(lr.LowRankError, match=r"largest entry of '.(mean|second)' is .*e.\d\d, which float32 does"):
        stats.save(path, dtype=torch.float32)
    assert list(path.parent.iterdir()) == []
    stats.save(path)
    assert torch.equal(lr.Statistics.load(path)[""].inputs.second, stats[""].inputs.second)


Pair = namedtuple("Pair", "one other")


@pytest.mark.parametrize(
    ("example", "held"),
    [
        ((torch.ones(1, 2, dtype=torch.bfloat16), [torch.zeros(1, dtype=torch.long), None]), True),
        ({"x": torch.ones(1, 3)[:, ::2], "flags": {"cache": False, "size": 2.5, "kind": "text"}}, True),
        (Pair(torch.ones(1), torch.ones(1)), False),
        (torch.ones(1, dtype=torch.complex64), False),
        ({1: torch.ones(1)}, False),
    ],
)
def test_an_example_is_held_or_left_out(path, example, held):
    stats = dataclasses.replace(calibrated(nn.Linear(8, 4)), example=example)
    stats.save(path)
    loaded = lr.Statistics.load(path).example
    if held:
        assert shown(loaded) == shown(example)
    else:
        assert loaded is None


def test_refuses_what_no_file_holds(path):
    stats = calibrated(nn.Linear(8, 4))
    with pytest.raises(lr.LowRankError, match=r"got dtype=torch.bfloat16, expected torch.float64 or torch.float32"):
        stats.save(path, dtype=torch.bfloat16)
    for nowhere in (path / "deeper" / "stats.safetensors", path.parent):
        with pytest.raises(lr.CheckpointError, match="it is a folder, or its folder does not exist"):
            stats.save(nowhere)
    stats.mask = lambda batch: batch > 0
    with pytest.raises(lr.LowRankError, match="mask is a function"):
        stats.save(path)
    assert list(path.parent.iterdir()) == []


def damaged(path: Path, change: object) -> None:
    """Writes the file again with a changed body."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    body = json.loads(metadata[statistics_file.KEY])
    change(body, tensors)
    save_file(tensors, path, metadata={statistics_file.KEY: json.dumps(body)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body, tensors: body.update(version=2), "another format version than 1"),
        (lambda body, tensors: body.pop("samples"), "KeyError: 'samples'"),
        (lambda body, tensors: body["layers"]["2"].pop("positions"), "KeyError: 'positions'"),
        (lambda body, tensors: body["layers"].pop("2"), r"tensors \['2.gradients', '2.mean', '2.second'\] that belong"),
        (lambda body, tensors: tensors.pop("2.mean"), "KeyError: '2.mean'"),
        (lambda body, tensors: body["layers"]["2"].update(inputs="1"), "KeyError: '1'"),
        (lambda body, tensors: tensors.update({"2.second": torch.eye(3)}), "tensors of '2' that do not fit"),
        (lambda body, tensors: tensors.update({"2.gradients": torch.ones(2, 3)}), "tensors of '2' that do not fit"),
        (lambda body, tensors: tensors.update({"2.cross": torch.eye(3)}), "tensors of '2' that do not fit"),
        (lambda body, tensors: body.update(example={"array": []}), "KeyError: 'array'"),
        (lambda body, tensors: body.update(layers=[]), "AttributeError"),
    ],
)
def test_damaged_files_are_refused(path, change, message):
    calibrated(small()).save(path)
    damaged(path, change)
    with pytest.raises(lr.CheckpointError, match=f"is damaged, or holds no statistics: .*{message}"):
        lr.Statistics.load(path)


def test_foreign_torn_and_replaced_files_are_refused(path):
    with pytest.raises(lr.CheckpointError, match="there is no such file"):
        lr.Statistics.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(lr.CheckpointError, match=r"was not written by Statistics\.save"):
        lr.Statistics.load(path)
    stats = calibrated(small())
    stats.save(path)
    loaded = lr.Statistics.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(lr.CheckpointError, match="is torn"):
        lr.Statistics.load(path)
    with pytest.raises(lr.CheckpointError, match="was replaced since its statistics were loaded"):
        loaded["2"].inputs.second  # noqa: B018 - it is read here


def test_what_is_read_may_be_written_to(path):
    stats = calibrated(nn.Linear(8, 4))
    stats.save(path)
    loaded = lr.Statistics.load(path)
    loaded[""].inputs.second.zero_()
    assert torch.equal(loaded[""].inputs.second, stats[""].inputs.second)
