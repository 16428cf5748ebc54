"""Passes that pause before each layer: every layer runs once, whatever the model, and nothing else changes."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.compress import side_by_side

WIDTH = 8


class Block(nn.Module):
    """Query, key and value read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / WIDTH**0.5
        return x + self.out(scores.softmax(-1) @ self.value(x))


class Shared(nn.Module):
    """Calls one layer twice, with another one between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.between, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x).tanh()).tanh()
        return self.last(self.shared(self.between(x).tanh()).tanh())


class Routed(nn.Module):
    """Calls its experts in an order, or not at all, as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if x[0, 0, 0] > 0:
            x = self.right(self.left(x).tanh()).tanh()
        elif x[0, 0, 1] > 0:
            x = self.left(self.right(x).tanh()).tanh()
        return self.last(x)


class Stateful(nn.Module):
    """Keeps its input in itself until the end of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.skip = self.first(x)
        return self.third(self.second(self.skip.tanh()) + self.skip)


def blocks(depth: int = 2) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(depth)))


def factorized(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    stats = lr.calibrate(model, batches, lr.SampledCrossEntropy())
    plan = lr.make_plan(model, rank=3, stats=stats, methods=[lr.SVDMethod()])
    if "between" in plan:
        plan.drop("between")  # refitted
    return lr.factorize_(model, plan, stats, batches).state_dict()


def data() -> list[Tensor]:
    return [torch.randn(5, 6, WIDTH) for _ in range(4)]


@pytest.mark.parametrize("make", [blocks, Shared, Routed, Stateful])
def test_passes_that_pause_give_what_passes_from_the_start_give(make, monkeypatch):
    model, batches = make(), data()
    found = factorized(model, batches)
    monkeypatch.setattr(side_by_side, "HELD", 0)
    expected = factorized(model, batches)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def passes_per_batch(depth: int) -> float:
    """How often a block is run per batch while its layers are factorized."""
    model, batches = blocks(depth), data()
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, rank=3, stats=stats)
    calls = []
    for block in model:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    lr.factorize_(model, plan, stats, batches)
    return len(calls) / depth / len(batches)


def test_a_block_is_run_once_per_model_and_batch_whatever_the_depth():
    assert passes_per_batch(2) == passes_per_batch(8) == 2 + 4 / 4  # and four times to look ahead


def test_a_model_that_changes_a_layers_input_in_place_is_run_once_too():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            total = self.second(x)
            x += 1
            return self.third(total + x)

    model, batches, calls = Changing(), data(), []
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, rank=3, stats=stats)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    lr.factorize_(model, plan, stats, batches)
    assert len(calls) == 2 * 4 + 4


@pytest.mark.parametrize("kept_in_files", [False, True])
def test_the_passes_that_look_ahead_hold_one_layer_of_a_mapped_model(kept_in_files, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank_layers.memory.SPILLED", 1)
    model, batches, held, most = blocks(3).eval(), data(), set(), []
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]

    def release(tensors: object) -> None:
        held.difference_update(map(id, tensors))

    monkeypatch.setattr(side_by_side, "release_mapped", release)
    for name in names:
        weight = model.get_submodule(name).weight
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, weight=weight: held.add(id(weight)) or most.append(len(held))
        )
    folder = tmp_path if kept_in_files else None
    passes = side_by_side.SideBySide(model, names, batches, False, None, batches[0][:1], folder)
    with passes:
        assert list(passes.calls) == names
        assert len(passes._paused) == len(batches)
    assert most == [1] * len(most)
    assert not list(tmp_path.iterdir())


def test_layers_that_read_one_tensor_share_its_moments(monkeypatch):
    rows = []
    own = lr.compress.sequential.sums
    monkeypatch.setattr(lr.compress.sequential, "sums", lambda *given: rows.append(1) or own(*given))
    factorized(blocks(1), data())
    # own and paired, of key and of out: the query is the first layer, and the value reads what the key reads
    assert len(rows) == 2 * 2 * 4


def test_a_tensor_that_is_changed_between_two_layers_is_not_taken_for_the_same():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            total = self.second(x)
            x += 1
            return total + self.third(x)

    model, batches = Changing().double(), list(torch.randn(4, 2000, 3, WIDTH).double())
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, rank=2, stats=stats, damping=lr.Damping(inputs=0, outputs=0))
    plan.drop("second")
    plan.drop("third")
    small = lr.factorize_(copy.deepcopy(model), plan, stats, batches)
    x = torch.cat(batches).flatten(0, 1)
    inputs, outputs = small.first(x).tanh() + 1, model.third(model.first(x).tanh() + 1)
    best = torch.linalg.lstsq(inputs, outputs).solution
    torch.testing.assert_close(small.third.weight.mT, best, rtol=1e-3, atol=1e-5)


def test_a_model_that_fails_in_the_middle_leaves_nothing_behind(monkeypatch):
    model, batches = blocks(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, rank=3, stats=stats)
    calls = []

    def fails(*_: object) -> None:
        calls.append(1)
        if len(calls) > 8:
            raise ValueError("on purpose")

    hook = model[1].register_forward_pre_hook(fails)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="on purpose"):
        lr.factorize_(model, plan, stats, batches)
    hook.remove()
    assert threading.active_count() == threads
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert type(lr.factorize_(model, plan, stats, batches)[0].key) is lr.LowRankLinear


def test_passes_see_the_autocast_of_the_caller():
    model, batches = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), data()
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, rank=3, stats=stats)
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        lr.factorize_(model, plan, stats, batches)
    assert len(seen) == 2 * 4 + 4
    assert set(seen) == {torch.bfloat16}
