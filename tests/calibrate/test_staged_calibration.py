"""Calibration in stages gives the statistics of the whole, and holds the moments of one stage."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.calibrate import staged_calibration
from lowrank_layers.calibrate.moments import Moments
from lowrank_layers.calibrate.staged_calibration import calibrate_in_stages

from .merge_cases import Energy, assert_equal, cases, shown
from .staged_models import MODELS, case, linears

TRANSFORMERS = ("llama", "t5")


@pytest.mark.parametrize("with_loss", [False, True], ids=["inputs", "gradients"])
@pytest.mark.parametrize("name", [*MODELS, *cases()])
def test_statistics_are_those_of_the_whole(name, with_loss, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_layers.memory.SPILLED", 1)  # all inputs of stages are kept in files
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
        if importlib.util.find_spec("torchvision"):
            import_torchvision()
    model, batches, loss, options = case(name, with_loss)
    got = lr.calibrate(model, batches, loss, folder=tmp_path / "new", **options)
    model, batches, loss, options = case(name, with_loss)
    want = lr.calibrate(model, batches, loss, **options)
    assert_equal(got, want, tolerance=1e-6 if name in (*TRANSFORMERS, "experts") else 1e-9)  # float32 in places
    assert got.other_macs == want.other_macs
    assert shown(got.example) == shown(want.example)
    assert not [file for file in (tmp_path / "new").iterdir() if file.suffix != ".safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_to_its_rounding(dtype, tmp_path):
    model = linears(3).to(dtype)
    batches = [batch.to(dtype) for batch in rows()]
    got = lr.calibrate(model, batches, lr.SampledCrossEntropy(), folder=tmp_path)
    want = lr.calibrate(model, batches, lr.SampledCrossEntropy())
    assert_equal(got, want, tolerance=8 * torch.finfo(dtype).eps)


def rows(count: int = 3) -> list[Tensor]:
    torch.manual_seed(7)
    return [torch.randn(6, 8) for _ in range(count)]


@pytest.mark.parametrize("loss", [None, Energy()], ids=["inputs", "gradients"])
def test_moments_of_one_stage_are_held(loss, tmp_path, monkeypatch):
    """Those of a layer are two, of inputs and of gradients; at every depth no more are alive at a time."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    new = Moments.zeros

    def counted(*args, **kwargs):
        nonlocal most
        moments = new(*args, **kwargs)
        alive.add(moments.second)
        most = max(most, len(alive))
        return moments

    monkeypatch.setattr(Moments, "zeros", counted)
    lr.calibrate(linears(6), rows(), loss, folder=tmp_path)
    assert most == (1 if loss is None else 2)


class Counted(nn.Module):
    """A layer that counts the samples it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.samples = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.layer(x)


@pytest.mark.parametrize("depth", [3, 9])
@pytest.mark.parametrize("loss", [None, Energy()], ids=["inputs", "gradients"])
def test_every_stage_is_run_once_and_once_more_with_a_loss(loss, depth, tmp_path):
    """And for the first sample once more without one, to see how often stages are called."""
    model = nn.Sequential(*(Counted() for _ in range(depth)))
    lr.calibrate(model, rows(4), loss, folder=tmp_path)
    assert {block.samples for block in model} == {4 * 6 + 1 if loss is None else 2 * 4 * 6}


def test_no_gradients_of_weights_are_formed(tmp_path):
    model = linears(2)
    for parameter in model.parameters():
        parameter.register_hook(lambda _: pytest.fail("a gradient of a weight"))
    lr.calibrate(model, rows(), Energy(), folder=tmp_path)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("loss", [None, Energy()], ids=["inputs", "gradients"])
@pytest.mark.parametrize("name", ["mlp", "shared", "translator", "padding"])
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(name, loss, tmp_path):
    def run(folder: Path, stop: int) -> list[str]:
        stages: list[str] = []

        def after(stage: str) -> None:
            stages.append(stage)
            if len(stages) == stop:
                raise KeyboardInterrupt

        model, batches, own, options = case(name, loss is not None)
        calibrate_in_stages(model, batches, own, folder=folder, after_stage=after, **options)
        return stages

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    stages = run(tmp_path / "whole", 0)
    whole = files(tmp_path / "whole")
    counts = set()
    for stop in range(1, len(stages) + 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part", stop)
        counts.add(len(files(tmp_path / "part")))
    assert len(counts) > 1
    assert run(tmp_path / "part", 0) == stages
    assert files(tmp_path / "part") == whole


class Gated(nn.Module):
    """Two layers that read one tensor; a batch of seven has the second one read another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) + F.pad(self.up(x if len(x) != 7 else x * 2), (0, 2))


@pytest.mark.parametrize("loss", [None, Energy()], ids=["inputs", "gradients"])
def test_layers_that_read_one_tensor_share_moments_that_are_formed_once(loss, tmp_path, monkeypatch):
    model = nn.Sequential(Gated(), Gated())
    want = lr.calibrate(model, rows(), loss)
    updates = []
    update = Moments.update

    def counted(moments: Moments, x: Tensor) -> None:
        updates.append(x.shape)
        update(moments, x)

    monkeypatch.setattr(Moments, "update", counted)
    got = lr.calibrate(model, rows(), loss, folder=tmp_path)
    assert_equal(got, want, tolerance=1e-5)
    assert len(updates) == 3 * (2 if loss is None else 2 + 4)  # three batches; gradients are each layer's own
    for stage in ("0", "1"):
        assert got[f"{stage}.gate"].inputs is got[f"{stage}.up"].inputs
    with pytest.raises(lr.LowRankError, match="not for another one"):
        lr.calibrate(model, [*rows(), torch.randn(7, 8)], loss, folder=tmp_path / "other")


def test_what_a_folder_holds_has_to_be_of_the_same_data_model_and_loss(tmp_path):
    model = linears(1)
    lr.calibrate(model, rows(), Energy(), folder=tmp_path)
    with pytest.raises(lr.LowRankError, match="give an empty folder"):
        lr.calibrate(model, rows(2), Energy(), folder=tmp_path)
    with pytest.raises(lr.LowRankError, match="give an empty folder"):
        lr.calibrate(model, rows(), lr.SampledCrossEntropy(), folder=tmp_path)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(lr.LowRankError, match="give an empty folder"):
        lr.calibrate(model, rows(), Energy(), folder=tmp_path)


def test_bad_folders_and_stages_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "no" / "folder"):
        with pytest.raises(lr.LowRankError, match="expected a folder"):
            lr.calibrate(linears(1), rows(), folder=folder)
    with pytest.raises(lr.LowRankError, match=r"expected folder="):
        lr.calibrate(linears(1), rows(), stages=["0"])


@pytest.mark.parametrize("loss", [None, Energy()], ids=["inputs", "gradients"])
def test_no_data_is_refused(loss, tmp_path):
    with pytest.raises(lr.LowRankError, match="no layer saw any data"):
        lr.calibrate(linears(1), [], loss, folder=tmp_path)


def test_a_loss_without_gradients_is_refused(tmp_path):
    with pytest.raises(lr.LowRankError, match="no gradient at this model's output"):
        lr.calibrate(linears(1), rows(), lambda output, _: output.sum() * 0, folder=tmp_path)


def test_more_batches_than_there_may_be_threads_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_calibration, "THREADS", 2 * max(1, torch.get_num_threads() - 1))
    lr.calibrate(linears(1), rows(2), folder=tmp_path)
    with pytest.raises(lr.LowRankError, match="got 3 batches, expected at most 2"):
        lr.calibrate(linears(1), rows(3), folder=tmp_path)


class Block(nn.Module):
    """A layer and something that cannot be run twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.calls = nn.Linear(8, 8), kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kind == "random":
            return self.layer(x) + torch.randn(8)
        if self.kind == "counts":
            return self.layer(x) * self.calls
        if self.kind == "in place":
            return self.layer(x.mul_(2))
        return self.layer(x)


class Kept:
    """An object that holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Wrapped(Block):
    """Returns its output in an object."""

    def forward(self, x: Tensor) -> Kept:
        return Kept(super().forward(x))


class Chain(nn.Module):
    """One block, perhaps inside activation checkpointing, and a head."""

    def __init__(self, block: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.reentrant, self.head = nn.ModuleList([block]), reentrant, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            x = self.blocks[0](x)
        else:
            x = checkpoint(lambda y: self.blocks[0](y).sin(), x * 2, use_reentrant=self.reentrant)
        return self.head(x.tensor if isinstance(x, Kept) else x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chain(Block("random")), "returned something else"),
        (Chain(Block("counts")), "returned something else"),
        (Chain(Block("in place")), "changes its input in place"),
        (Chain(Wrapped("")), "in an object of type Kept"),
        (Chain(Block(""), reentrant=True), "activation checkpointing"),
        (Chain(Block(""), reentrant=False), "activation checkpointing"),
    ],
)
def test_what_cannot_be_run_in_stages_is_refused_and_the_model_left_as_it_was(model, message, tmp_path):
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(lr.LowRankError, match=message) as error:
        lr.calibrate(model, rows(), Energy(), folder=tmp_path)
    assert "without folder=" in str(error.value)
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys()
        assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 0


def test_stages_are_those_that_the_user_names(tmp_path):
    model, names = linears(2), []
    want = lr.calibrate(model, rows(), Energy())
    got = calibrate_in_stages(
        model, rows(), Energy(), folder=tmp_path, stages=["0"], target=["2", "4"], after_stage=names.append
    )
    assert list(got) == ["2", "4"]
    assert names == ["0", "2", "4", "6", "4", "2", "0"]
    torch.testing.assert_close(got["4"].gradients, want["4"].gradients)


def test_files_in_float32_hold_the_same_to_rounding(tmp_path):
    model = linears(2)
    want = lr.calibrate(model, rows(), Energy(), folder=tmp_path / "64")
    got = calibrate_in_stages(model, rows(), Energy(), folder=tmp_path / "32", dtype=torch.float32)
    assert_equal(got, want, tolerance=1e-5)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("64", "32")]
    moments = sum(stats.inputs.second.numel() + stats.gradients.numel() for stats in want.values())
    assert sizes[0] - sizes[1] >= 4 * moments
    with pytest.raises(lr.LowRankError, match="give an empty folder"):
        lr.calibrate(model, rows(), Energy(), folder=tmp_path / "32")


def test_a_plan_and_its_weights_are_those_of_the_whole(tmp_path):
    model, other = linears(2), linears(2)
    other.load_state_dict(model.state_dict())
    plans = []
    for each, options in ((model, {}), (other, {"folder": tmp_path})):
        stats = lr.calibrate(each, rows(9), Energy(), **options)
        plans.append(lr.make_plan(each, lr.Budget(params=0.6), stats=stats))
        lr.factorize_(each, plans[-1], stats=stats)
    assert list(plans[0]) == list(plans[1])
    x = torch.randn(5, 8)
    torch.testing.assert_close(model(x), other(x))
