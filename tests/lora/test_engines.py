"""Adapters under everything that trains and runs models: several processes, compilers, checkpointing, autocast."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter
from tests.processes import run_processes

from . import distributed_worker
from .distributed_worker import Blocks, adapted, joint, train
from .peer import scramble, wrapped

TIGHT = 1e-5


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrap", distributed_worker.WRAPS)
def test_two_processes_train_adapters_as_one_does(wrap, tmp_path):
    """Without find_unused_parameters: every adapter gets its gradient; the base stays, to the bit."""
    first, other = run_processes(distributed_worker.run, tmp_path, wrap, world=distributed_worker.WORLD)
    alone = adapted()
    start = copy.deepcopy(alone.state_dict())
    learned = {name for name, p in alone.named_parameters() if p.requires_grad}
    losses = train(alone, joint())
    means = [sum(pair) / 2 for pair in zip(first["losses"], other["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=TIGHT)
    assert first["state"].keys() == other["state"].keys() == start.keys()
    for key, tensor in alone.state_dict().items():
        assert torch.equal(first["state"][key], other["state"][key]), key
        assert relative(first["state"][key], tensor) < TIGHT, key
        assert torch.equal(first["state"][key], start[key]) == (key not in learned), key
    if wrap == "fsdp":
        total = sum(p.numel() for p in alone.parameters())
        assert first["held"] + other["held"] == total
        assert max(first["held"], other["held"]) < 0.7 * total


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_checkpointing_gives_the_same_gradients(dora):
    model, (x, _) = adapted(dora), joint()[0]
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    features = checkpoint(model.table, x, use_reentrant=False)
    features = checkpoint(model.encoder, features, use_reentrant=False)
    features = checkpoint(lambda t: model.conv(t.mT).relu(), features, use_reentrant=False)
    checkpoint(lambda t: model.head(t.mean(-1)), features, use_reentrant=False).square().sum().backward()
    got = gradients(model)
    assert got.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast_runs_and_learns(dora):
    model, (x, _) = adapted(dora), joint()[0]
    expected = model(x)
    expected.square().sum().backward()
    full = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        loss = out.float().square().sum()
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) < 0.1
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, full[name]) < 0.3, name


def test_autocast_takes_mixed_rows():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 16)
    for name in "ab":
        lr.add_lora_(model, rank=2, name=name)
    scramble(model)
    with lr.lora_rows(model, ["a", None, "b"]):
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert relative(out, expected) < 0.05


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8), (4, 3, 5, 8)], ids=str)
def test_mixed_rows_are_each_adapter_alone(shape, ranks, init):
    """Outputs and gradients, with one token a row or many, with equal ranks or not."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(shape)
    for name, rank in zip("abc", ranks, strict=True):
        lr.add_lora_(model, rank=rank, alpha=3, name=name, init=init)
    scramble(model)
    rows = ["c", None, "a", "c"]
    outs = []
    for k, name in enumerate(rows):
        outs.append(lr.use_adapter(model, name)(x[k : k + 1]))
        if name is not None:
            outs[-1].square().sum().backward()
    alone, expected = torch.cat(outs), gradients(model)
    model.zero_grad()
    with lr.lora_rows(lr.use_adapter(model, list("abc")), rows):
        mixed = model(x)
        mixed.square().sum().backward()
    assert relative(mixed, alone) < TIGHT
    for name, gradient in gradients(model).items():
        want = expected.get(name, torch.zeros_like(gradient))
        assert relative(gradient, want) < 3 * TIGHT or not gradient.any(), name  # sums of roundings, in another order


def test_mixed_rows_have_their_own_bias():
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    for name in "ab":
        lr.add_lora_(model, rank=2, name=name, bias=True)
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    rows = ["a", None, "b"]
    alone = torch.cat([lr.use_adapter(model, name)(x[k : k + 1]) for k, name in enumerate(rows)])
    with lr.lora_rows(lr.use_adapter(model, "a"), rows):
        assert relative(model(x), alone) < TIGHT


class Everything(nn.Module):
    """A table, an attention called for itself, a convolution, a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.table(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.conv(x.mT).relu().mT)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_inductor_compiles_into_one_graph(dora):
    torch._dynamo.reset()
    model, x = Everything(), torch.randint(11, (2, 6))
    lr.add_lora_(model, lambda *_: True, rank=3, dora=dora)
    scramble(model)
    assert {name.split(".")[0] for name, _ in model.named_parameters() if "lora" in name} == set(
        dict(model.named_children())
    )
    expected = model(x)
    expected.square().sum().backward()
    full = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    out = compiled(x)
    out.square().sum().backward()
    assert relative(out, expected) < TIGHT
    assert all(relative(gradient, full[name]) < 10 * TIGHT for name, gradient in gradients(model).items())
    with torch.no_grad():
        scramble(model)
        assert relative(compiled.eval()(x), model.eval()(x)) < TIGHT


def test_a_compressed_model_takes_adapters_and_learns():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    x, y = torch.randn(32, 3, 6, 6), torch.randint(4, (32,))
    lr.factorize_(model, lr.make_plan(model, rank=4))
    kinds = [type(m).__name__ for m in model]
    assert sum(isinstance(m, lr.FactoredModule) for m in model) >= 2
    frozen = copy.deepcopy(model.state_dict())
    out = model(x)
    lr.add_lora_(model, ["0", "3", "5"], rank=4)
    assert relative(model(x), out) < TIGHT
    optimizer = torch.optim.Adam(lr.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    with lr.lora_disabled(model):
        assert torch.equal(model(x), out)
    assert [type(m).__name__ for m in lr.remove_lora_(model)] == kinds


def test_lora_plus_groups_hold_every_parameter_once():
    model = adapted(dora=True)
    slow, fast = lr.lora_parameters(model, lr=1e-3, ratio=8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in fast["params"]} == {"B"}
    assert {names[id(p)].rsplit(".", 1)[1] for p in slow["params"]} == {"A", "magnitude"}
    every = [id(p) for p in slow["params"] + fast["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in lr.lora_parameters(model)}
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}
    before = {id(p): p.detach().clone() for p in model.parameters()}
    optimizer = torch.optim.SGD(lr.lora_parameters(model, lr=0.1, ratio=8))
    x, y = joint()[0]
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for p in fast["params"]:
        assert relative(before[id(p)] - p, 0.8 * p.grad) < 1e-2
    assert all((not torch.equal(before[id(p)], p)) == (id(p) in set(every)) for p in model.parameters())


def test_the_parameters_of_one_adapter():
    model = nn.Sequential(nn.Linear(8, 6))
    lr.add_lora_(lr.add_lora_(model, rank=2, name="a"), rank=3, name="b")
    assert [tuple(p.shape) for p in lr.lora_parameters(model, "b")] == [(3, 8), (6, 3)]
    with pytest.raises(lr.LowRankError, match="'c'"):
        lr.lora_parameters(model, "c")


def test_freeze_a_trains_b_alone():
    """Of an embedding, whose A starts at zero, it trains A alone."""
    torch.manual_seed(0)
    model = lr.add_lora_(Blocks(), lambda *_: True, rank=3, freeze_a=True)
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}
    trained = {name: "A" if name.startswith("table") else "B" for name in adapters}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{factor}" for name, factor in trained.items()}
    frozen = {name: m.B if trained[name] == "A" else m.A for name, m in adapters.items()}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    losses = train(model, [joint()[0]] * 20)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in frozen.items())
    slow, fast = lr.lora_parameters(model, lr=1e-3)
    assert len(slow["params"]) == 1
    assert len(fast["params"]) == len(adapters) - 1
    torch.optim.AdamW([slow, fast]).step()


DORA = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 9, 9)),
}


@pytest.mark.parametrize("name", DORA)
def test_dora_is_the_peers(name):
    """The same parameters give the same outputs and the same gradients."""
    build, shape = DORA[name]
    plain, x = build(), torch.randn(shape)
    model = lr.add_lora_(nn.Sequential(copy.deepcopy(plain)), lambda *_: True, rank=4, alpha=8, dora=True)
    theirs = wrapped(nn.Sequential(plain), ["0"], use_dora=True)
    layer = theirs.base_model.model[0]
    (adapter,) = model[0].lora_weight.adapters.values()
    with torch.no_grad():
        adapter.A.copy_(layer.lora_A["default"].weight)
        adapter.B.copy_(layer.lora_B["default"].weight)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.mul_(torch.rand_like(magnitude) + 0.5)
        adapter.magnitude.copy_(magnitude.flatten())
    out, expected = model(x), theirs(x)
    assert relative(out, expected) < TIGHT
    out.square().sum().backward()
    expected.square().sum().backward()
    assert relative(adapter.A.grad, layer.lora_A["default"].weight.grad) < 10 * TIGHT
    assert relative(adapter.B.grad, layer.lora_B["default"].weight.grad) < 10 * TIGHT
    assert relative(adapter.magnitude.grad, magnitude.grad.flatten()) < 10 * TIGHT
    with torch.no_grad():
        assert relative(lr.merge_lora_(model)(x), expected) < TIGHT
