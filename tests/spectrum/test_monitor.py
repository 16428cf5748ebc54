"""SpectrumMonitor in training: what it measures, when, and that it leaves nothing behind."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import lowrank_layers as lr
from lowrank_layers.trainer_callbacks import lightning_callback


class Net(nn.Module):
    """A convolution, an attention, an embedding, a low-rank layer and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.low = lr.LowRankLinear(48, 64, rank=6)
        self.head = nn.Linear(64, 50)

    def forward(self, tokens):
        x = self.conv(self.table(tokens).mT).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.low(x)))


NAMES = {"table.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "low.weight"} | {
    "head.weight"
}


def train(model, steps, optimizer=None, after=None):
    """Predicts the next of numbers that repeat."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3) if optimizer is None else optimizer
    for _ in range(steps):
        tokens = (torch.randint(50, (16, 1)) + torch.arange(13)) % 50
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        if after is not None:
            after()
    return optimizer


def weight_of(model, name):
    return model.low.weight if name == "low.weight" else model.get_parameter(name)


def assert_spectrum(spectrum, tensor):
    """Against all singular values of the matrix."""
    tensor = tensor.detach().flatten(1)
    exact = torch.linalg.svdvals(tensor.double())
    k = len(spectrum.singular_values)
    assert k == min(8, *tensor.shape)
    # 1 % of each value; a value that is zero up to rounding is within rounding of it
    bound = 0.01 * exact[:k] + 1e-4 * exact[0]
    assert bool(((torch.tensor(spectrum.singular_values).double() - exact[:k]).abs() <= bound).all())
    assert spectrum.frobenius_norm == pytest.approx(float(exact.square().sum().sqrt()), rel=1e-5)
    assert spectrum.spectral_norm == spectrum.singular_values[0]
    assert spectrum.stable_rank == pytest.approx(float(exact.square().sum() / exact[0] ** 2), rel=0.021)
    assert spectrum.energy == pytest.approx(float(exact[:k].square().sum() / exact.square().sum()), rel=0.021)


def test_weights_and_gradients_of_the_step_within_one_percent_of_svdvals():
    model, seen = Net(), []

    def check(record):
        assert set(record.weights) == NAMES
        assert set(record.gradients) == NAMES - {"low.weight"}
        for name, spectrum in record.weights.items():
            assert_spectrum(spectrum, weight_of(model, name))
        for name, spectrum in record.gradients.items():  # in the hook the gradients are still those of the step
            assert_spectrum(spectrum, model.get_parameter(name).grad)
        seen.append(record.step)

    with lr.SpectrumMonitor(model, every=10, callback=check) as monitor:
        train(model, 65)
    assert seen == [10, 20, 30, 40, 50, 60]
    assert [record.step for record in monitor.records] == seen
    # training moved the spectra, so the warm start had to follow
    first, last = monitor.records[0].weights["head.weight"], monitor.records[-1].weights["head.weight"]
    assert last.spectral_norm > 1.2 * first.spectral_norm


def test_a_warm_start_finds_a_direction_orthogonal_to_all_that_it_knew():
    layer = nn.Linear(200, 100, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:50].normal_()
    monitor = lr.SpectrumMonitor(layer, k=4)
    monitor.measure()
    with torch.no_grad():
        layer.weight[:50, :] = 0
        layer.weight[99, 199] = 7.0
    spectrum = monitor.measure().weights["weight"]
    assert spectrum.singular_values == pytest.approx((7.0, 0, 0, 0), abs=1e-4)


def test_lora_deltas_alone_where_the_base_is_frozen():
    model = lr.add_lora_(Net(), ["conv", "attention", "table", "head"], rank=2, alpha=6)
    before = {name: weight.base.detach().clone() for name, weight in adapted(model)}
    optimizer = torch.optim.Adam(lr.lora_parameters(model), lr=1e-2)
    with lr.SpectrumMonitor(model, every=4, k=3) as monitor:
        train(model, 8, optimizer)
    record = monitor.records[-1]
    assert record.weights.keys() == record.gradients.keys() == set()
    assert set(record.deltas) == {f"{name}/default" for name in before}
    lr.merge_lora_(model)
    for name, weight in adapted(model):
        delta = (weight.dense.detach() - before[name]).flatten(1)
        exact = torch.linalg.svdvals(delta.double())[:3].tolist()
        assert record.deltas[f"{name}/default"].singular_values == pytest.approx(exact, rel=0.01, abs=1e-5)
        assert exact[2] < 1e-5 < exact[1] or name == "conv.weight"


def adapted(model):
    from lowrank_layers.lora.adapted_weight import adapted_weights

    return [(weight.name, weight) for weight in adapted_weights(model)]


def test_layers_chosen_by_name_are_measured_although_frozen():
    model = Net().requires_grad_(False)
    with pytest.raises(lr.LowRankError, match="also frozen ones"):
        lr.SpectrumMonitor(model)
    record = lr.SpectrumMonitor(model, target=["low", "attention", nn.Conv1d]).measure()
    assert set(record.weights) == NAMES - {"table.weight", "head.weight"}


def test_only_the_last_records_are_kept():
    model = Net()
    with lr.SpectrumMonitor(model, every=1, k=1, target=["head"], keep=3, gradients=False) as monitor:
        train(model, 5)
    assert [record.step for record in monitor.records] == [3, 4, 5]
    assert monitor.records[-1].gradients == {}


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks)


def test_no_hook_is_left_behind_also_after_an_error():
    model, before = Net(), hooks()
    monitor = lr.SpectrumMonitor(model, every=1, target=["head"])

    def fail():
        assert hooks() == before + 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), monitor:
        train(model, 1, after=fail)
    assert hooks() == before
    train(model, 1)
    assert [record.step for record in monitor.records] == [1]
    with monitor, pytest.raises(lr.LowRankError, match="in use already"), monitor:
        pass
    assert hooks() == before
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_one_optimizer_counts():
    model, other = Net(), nn.Linear(2, 2)
    first = torch.optim.SGD(model.head.parameters(), lr=0.1)
    second = torch.optim.SGD(model.conv.parameters(), lr=0.1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)

    def step():
        foreign.step()
        second.step()

    with lr.SpectrumMonitor(model, every=2, target=["head"]) as monitor:
        foreign.step()
        train(model, 4, first, step)
    assert [record.step for record in monitor.records] == [2, 4]
    with lr.SpectrumMonitor(model, every=1, target=["conv"], optimizer=second) as monitor:
        train(model, 2, first)
        assert monitor.records == []
        second.step()
    assert [record.step for record in monitor.records] == [1]


def test_steps_by_hand():
    model = Net()
    monitor = lr.SpectrumMonitor(model, every=3, target=["head"])
    monitor.steps = 1  # resumed
    train(model, 6, after=monitor.step)
    assert [record.step for record in monitor.records] == [3, 6]


def test_a_compiled_model_is_compiled_once():
    model, frames = Net(), []

    def backend(module, inputs):
        frames.append(module)
        return module.forward

    model.head = torch.compile(model.head, backend=backend)
    compiled = torch.compile(model, backend=backend)
    with lr.SpectrumMonitor(compiled, every=1, target=["low", "head"]) as monitor:
        train(compiled, 3, torch.optim.SGD(model.parameters(), lr=0.1))
    graphs = len(frames)
    assert graphs
    assert set(monitor.records[-1].weights) == {"low.weight", "head.weight"}
    assert set(monitor.records[-1].gradients) == {"head.weight"}
    train(compiled, 1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(frames) == graphs


def test_gradients_that_are_not_finite_are_recorded_as_such(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight.grad = torch.full((6, 6), math.inf)
    file = tmp_path / "spectra.jsonl"
    record = lr.SpectrumMonitor(model, file=file).measure()
    gradient = record.gradients["0.weight"]
    assert gradient.singular_values == ()
    assert all(map(math.isnan, (gradient.frobenius_norm, gradient.spectral_norm, gradient.stable_rank)))
    assert json.loads(file.read_text())["gradients"]["0.weight"]["stable_rank"] is None
    assert lr.read_spectra(file)[0].weights == record.weights


def test_sparse_tiny_and_half_precision_gradients():
    table, layer = nn.Embedding(40, 12, sparse=True), nn.Linear(12, 40).bfloat16()
    table(torch.tensor([[3, 3, 7]])).sum().backward()
    layer.weight.grad = torch.randn(40, 12).bfloat16() * 1e-30  # its squares vanish in fp32
    record = lr.SpectrumMonitor(nn.ModuleDict({"table": table, "layer": layer})).measure()
    for name, gradient in (("table", table.weight.grad.to_dense()), ("layer", layer.weight.grad)):
        exact = torch.linalg.svdvals(gradient.double()).tolist()
        spectrum = record.gradients[f"{name}.weight"]
        assert spectrum.singular_values == pytest.approx(exact[:8], rel=0.01, abs=1e-5 * exact[0])
        assert spectrum.frobenius_norm == pytest.approx(float(gradient.double().norm()), rel=1e-5)


def test_a_layer_of_another_shape_in_its_place_is_measured_anew():
    model = nn.Sequential(nn.Linear(20, 30))
    monitor = lr.SpectrumMonitor(model)
    monitor.measure()
    model[0] = nn.Linear(20, 40)
    assert_spectrum(monitor.measure().weights["0.weight"], model[0].weight)


KILLED = """
import os, signal, sys, torch, lowrank_layers as lr
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with lr.SpectrumMonitor(model, every=2, file=sys.argv[1]):
    for step in range(100):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_file_is_readable_after_a_kill_and_goes_on(tmp_path):
    file = tmp_path / "spectra.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert [record.step for record in lr.read_spectra(file)] == [2, 4, 6]
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 8, "wei')  # killed while it wrote
    assert [record.step for record in lr.read_spectra(file)] == [2, 4, 6]
    monitor = lr.SpectrumMonitor(nn.Linear(8, 8), file=file)
    monitor.steps = 7
    monitor.step()
    monitor.every = 1
    monitor.step()
    assert file.read_bytes().startswith(whole)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4, 6, 9]
    assert lr.read_spectra(file)[-1] == monitor.records[-1]


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(lr.CheckpointError, match="no such file"):
        lr.read_spectra(tmp_path / "none.jsonl")
    file = tmp_path / "other.jsonl"
    file.write_text('{"step": 1}\n')
    with pytest.raises(lr.CheckpointError, match="line 1 is no record"):
        lr.read_spectra(file)


def test_scalars_of_tensorboard():
    scalars = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: scalars.update({(tag, step): value}))
    monitor = lr.SpectrumMonitor(nn.Sequential(nn.Linear(4, 6)), k=2, tensorboard=writer)
    monitor.steps = 7
    spectrum = monitor.measure().weights["0.weight"]
    assert scalars == {
        ("weights/0.weight/frobenius_norm", 7): spectrum.frobenius_norm,
        ("weights/0.weight/stable_rank", 7): spectrum.stable_rank,
        ("weights/0.weight/singular_value_1", 7): spectrum.singular_values[0],
        ("weights/0.weight/singular_value_2", 7): spectrum.singular_values[1],
    }


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    for module in ("torch.utils.tensorboard", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(lr.MissingExtraError, match="TensorBoard is not installed: pip install tensorboard"):
        lr.SpectrumMonitor(nn.Linear(4, 4), tensorboard=tmp_path)
    with pytest.raises(lr.MissingExtraError, match="Lightning is not installed: pip install lightning"):
        lr.SpectrumMonitor(nn.Linear(4, 4)).to_lightning_callback()


def test_the_callback_for_lightning(monkeypatch):
    """By the names of Lightning's hooks, which is not among what the tests install."""
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=type("Callback", (), {})))
    model = Net()
    monitor = lr.SpectrumMonitor(model, every=2, target=["head"])
    callback, trainer = monitor.to_lightning_callback(), SimpleNamespace(global_step=3)
    before = hooks()
    callback.on_train_start(trainer, model)
    train(model, 3)
    callback.on_train_end(trainer, model)
    assert hooks() == before
    assert [record.step for record in monitor.records] == [4, 6]
    callback.on_train_start(trainer, model)
    callback.on_exception(trainer, model, ValueError())
    assert hooks() == before
    assert isinstance(lightning_callback(print, print), sys.modules["lightning.pytorch"].Callback)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "got every=0"),
        ({"k": 1.5}, "got k=1.5"),
        ({"keep": True}, "got keep=True"),
        ({"callback": 3}, "got callback=3, expected a function"),
        ({"target": ["haed"]}, "'haed' matches no module of the model. Did you mean 'head'"),
        ({"target": "head"}, r"expected a list; write \['head'\]"),
        ({"target": [nn.Embedding, "nothing"]}, "'nothing' matches no module"),
        ({"file": "missing/spectra.jsonl"}, "expected a file in an existing folder"),
        ({"tensorboard": 3}, "got tensorboard=3, expected a folder or a SummaryWriter"),
        ({"optimizer": "adam"}, "got optimizer=str, expected a torch optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "that holds parameters of the model"),
    ],
)
def test_bad_inputs(settings, message):
    with pytest.raises(lr.LowRankError, match=message):
        lr.SpectrumMonitor(Net(), **settings)


def test_what_is_no_model_or_has_no_matrix():
    with pytest.raises(lr.LowRankError, match=r"got list, expected a torch\.nn\.Module"):
        lr.SpectrumMonitor([nn.Linear(2, 2)])
    with pytest.raises(lr.LowRankError, match="without a matrix"):
        lr.SpectrumMonitor(nn.LayerNorm(4))
