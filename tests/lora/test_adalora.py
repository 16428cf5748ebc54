"""Ranks allocated under a global budget: the paper's equations, the peer's numbers, a task whose ranks are known."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr
from tests.processes import run_processes

from .allocation import MODELS, adapters, allocated, chain, favouring, kept, make, pretend
from .peer import peft
from .test_adapters import everything, scramble


def entry_scores(allocator, label, part):
    """The smoothed sensitivity of every entry of ``A`` or ``B`` times its uncertainty."""
    state = allocator.state_dict()
    return state[f"{label}.{part}.sensitivity"] * state[f"{label}.{part}.uncertainty"]


def entries(adapter, kind, a, b, i):
    """What belongs to direction ``i``, index by index."""
    groups = getattr(kind, "groups", None)
    if groups is None:
        return a[..., i, :], b[..., :, i]
    rank = adapter.B.shape[1]
    return torch.stack([a[j * rank + i] for j in range(groups)]), b[:, i]


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_that_of_the_papers_equations(name):
    model = make(name)[0]
    lr.add_lora_(model, everything, rank=1 if name == "depthwise" else 2, seed=0)
    scramble(model)
    b1, b2 = 0.7, 0.6
    allocator = lr.LoraRankAllocator(model, 1, start=3, stop=4, beta1=b1, beta2=b2)
    generator = torch.Generator().manual_seed(0)
    smooth, unsure = {}, {}
    for _ in range(4):
        pretend(model, generator)
        for label, (adapter, _) in adapters(model).items():
            for part, p in (("A", adapter.A), ("B", adapter.B)):
                now = (p.detach().double() * p.grad.double()).abs()
                key = label, part
                smooth[key] = b1 * smooth.get(key, 0) + (1 - b1) * now
                unsure[key] = b2 * unsure.get(key, 0) + (1 - b2) * (now - smooth[key]).abs()
        allocator.step()  # which sets what it drops to zero
    scores = {}
    for label, (adapter, kind) in adapters(model).items():
        a, b = (smooth[label, part] * unsure[label, part] for part in "AB")
        for part, expected in (("A", a), ("B", b)):
            error = entry_scores(allocator, label, part).double() - expected
            assert float(error.abs().max()) < 1e-6 * float(expected.max())
        for i in range(len(kept(allocator, label))):
            row, column = entries(adapter, kind, a, b, i)
            scores[label, i] = float(row.mean() + column.mean())
    best = sorted(scores, key=scores.get, reverse=True)[: allocator.budget(4)]
    assert len(best) < len(scores) or name == "depthwise"  # which has one direction
    assert {(label, i) for label, i in scores if kept(allocator, label)[i]} == set(best)


def test_schedule_scores_and_choice_are_those_of_the_peer():
    peft()
    from peft.tuners.adalora.layer import RankAllocator

    model = lr.add_lora_(chain(8, 6, 7, 5), rank=4)
    scramble(model)
    ours = lr.LoraRankAllocator(model, 2, start=5, stop=40, every=3)
    config = SimpleNamespace(beta1=0.85, beta2=0.85, target_r=2, tinit=5, tfinal=10, total_step=50, deltaT=3)
    named = {}
    for label, (adapter, _) in adapters(model).items():
        own = label.replace(".", "_")
        lam = nn.Parameter(torch.ones(4, 1))
        lam.grad = torch.zeros(4, 1)
        named |= {f"{own}.lora_{k}.default": p for k, p in (("A", adapter.A), ("B", adapter.B), ("E", lam))}
    theirs = RankAllocator(SimpleNamespace(named_parameters=named.items), config, "default")
    assert [ours.budget(t) for t in range(60)] == [theirs.budget_schedule(t)[0] for t in range(60)]
    generator, view = torch.Generator().manual_seed(0), SimpleNamespace(named_parameters=named.items)
    for t in range(1, 40):
        pretend(model, generator)
        chosen = theirs.update_and_allocate(view, t)[1]
        ours.step()
        if chosen is not None and ours.budget(t) < 12:
            for label in adapters(model):
                assert chosen[f"{label.replace('.', '_')}.lora_E.default"] == kept(ours, label).tolist()
    for label in adapters(model):
        for part in "AB":
            expected = theirs._element_score(f"{label.replace('.', '_')}.lora_{part}.default")
            assert torch.allclose(entry_scores(ours, label, part), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_the_budget_is_met_at_stop_and_never_left_again(every):
    model = lr.add_lora_(chain(8, 6, 7, 5), rank=5)
    allocator = lr.LoraRankAllocator(model, 7 / 3, start=3, stop=21, every=every)
    for t in range(1, 30):  # without gradients all scores are equal: ties
        allocator.step()
        total = sum(allocator.ranks().values())
        if t <= 3:
            assert total == 15
        elif t >= 21:
            assert total == 7
        elif t % every == 0:
            assert total == allocator.budget(t)


def product_per_direction(adapter, kind):
    a, b = kind.directions(adapter.A.detach(), adapter.B.detach())
    return [kind.product(*kind.joined(a[i : i + 1], b[i : i + 1])) for i in range(len(b))]


@pytest.mark.parametrize("name", MODELS)
def test_the_directions_of_every_layout_add_up(name):
    model = make(name)[0]
    lr.add_lora_(model, everything, rank=1 if name == "depthwise" else 2)
    scramble(model)
    for adapter, kind in adapters(model).values():
        parts = product_per_direction(adapter, kind)
        assert torch.allclose(sum(parts), kind.product(adapter.A, adapter.B), atol=1e-5)
        a, b = kind.joined(*kind.directions(adapter.A, adapter.B))
        assert torch.equal(a, adapter.A)
        assert torch.equal(b, adapter.B)


def test_sensitivity_is_measured_from_the_start():
    model = lr.add_lora_(chain(8, 8), rank=3, init="pissa")
    (adapter, _), allocator = adapters(model)["0.weight"], lr.LoraRankAllocator(model, 1, start=5, stop=6)
    pretend(model, torch.Generator().manual_seed(0), rate=0)
    with torch.no_grad():
        adapter.A[1] += 1
    allocator.step()
    moved = torch.zeros_like(adapter.A)
    moved[1] = 0.15 * adapter.A.grad[1].abs()
    state = allocator.state_dict()
    assert torch.allclose(state["0.weight.A.sensitivity"], moved, atol=1e-6)
    assert not bool(state["0.weight.B.sensitivity"].any())


def test_a_dropped_direction_may_come_back():
    model = lr.add_lora_(chain(6, 6, 6), rank=2)
    scramble(model)
    allocator = lr.LoraRankAllocator(model, 1, start=1, stop=60, beta1=0.3, beta2=0.3)
    generator, seen = torch.Generator().manual_seed(0), []
    for strong in ["0.weight"] * 40 + ["1.weight"] * 20:
        pretend(model, generator, favouring(strong))
        allocator.step()
        seen.append(allocator.ranks()["1.weight"])
    assert min(seen) == 0
    assert seen[-1] == 2


class Two(nn.Module):
    """Two layers that cannot stand in for each other."""

    def __init__(self, width=12):
        super().__init__()
        self.wide, self.thin = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([self.wide(a), self.thin(b)], -1)


def known_ranks(seed):
    """A base, and the data of a teacher that is it with deltas of rank 6 and 1, all singular values 1."""
    torch.manual_seed(seed)
    base = Two()
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for layer, rank in ((teacher.wide, 6), (teacher.thin, 1)):
            layer.weight += torch.linalg.qr(torch.randn(12, rank)).Q @ torch.linalg.qr(torch.randn(12, rank)).Q.mT
    x = torch.randn(256, 24)
    return base, x, teacher(x).detach()


def train(model, x, y, steps=500, **settings):
    optimizer = torch.optim.AdamW(lr.lora_parameters(model), lr=1e-2, weight_decay=0)
    allocator = lr.LoraRankAllocator(model, **settings) if settings else None
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if allocator:
            allocator.step()
        optimizer.zero_grad()
    if allocator:
        allocator.finish(optimizer)
    return (model(x) - y).square().mean().item(), allocator.ranks() if allocator else None


@pytest.mark.parametrize("seed", range(3))
def test_known_ranks_are_found_and_beat_equal_ones(seed):
    base, x, y = known_ranks(seed)
    loss, ranks = train(lr.add_lora_(copy.deepcopy(base), rank=8, seed=0), x, y, rank=3.5, start=100, stop=400, every=5)
    assert ranks == {"wide.weight": 6, "thin.weight": 1}
    uniform, _ = train(lr.add_lora_(base, rank=4, rank_pattern={"thin": 3}, seed=0), x, y)
    assert uniform > 0.02  # two of six directions are missing
    assert loss < 1e-4


@pytest.mark.parametrize("at", [2, 9, 17, 25])
def test_a_resumed_run_is_the_same_run(at, tmp_path):
    def made():
        torch.manual_seed(0)
        model = lr.add_lora_(chain(8, 6, 7, 5), rank=5, seed=0)
        optimizer = torch.optim.AdamW(lr.lora_parameters(model), lr=0.01)
        return model, optimizer, lr.LoraRankAllocator(model, 2, start=4, stop=20, every=3)

    def steps(first, last, model, optimizer, allocator):
        for t in range(first, last):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(t))
            (model(x) - x[:, :5]).square().mean().backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()

    whole = made()
    steps(0, 30, *whole)
    first, second = made(), made()
    steps(0, at, *first)
    torch.save([each.state_dict() for each in first], tmp_path / "run.pt")
    for each, state in zip(second, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        each.load_state_dict(state)
    steps(at, 30, *second)
    assert whole[2].ranks() == second[2].ranks()
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key])


def test_without_a_gradient_or_with_one_that_is_not_finite_the_averages_stay():
    model = lr.add_lora_(chain(8, 8, 6), rank=3)
    scramble(model)
    allocator = lr.LoraRankAllocator(model, 1, start=50, stop=60)
    generator = torch.Generator().manual_seed(0)
    pretend(model, generator)
    allocator.step()
    before = allocator.state_dict()
    pretend(model, generator, rate=0)
    model[1].lora_weight.adapters["default"].B.grad[0, 0] = float("inf")
    allocator.step()
    assert all(torch.equal(value, before[key]) for key, value in allocator.state_dict().items() if key != "step")
    pretend(model, generator, rate=0)
    for p in model[1].parameters():
        p.grad = None
    allocator.step()
    for key, value in allocator.state_dict().items():
        if "." in key and not key.endswith("kept"):
            assert torch.equal(value, before[key]) == key.startswith("1.")


def test_scores_of_half_precision_do_not_vanish():
    """A product of two halves of 1e-5 is zero in fp16."""
    model = lr.add_lora_(chain(8, 6).half(), rank=3)
    scramble(model)
    allocator = lr.LoraRankAllocator(model, 1, start=5, stop=6)
    pretend(model, torch.Generator().manual_seed(0), lambda label: 1e-5, rate=0)
    allocator.step()
    assert all(bool((entry_scores(allocator, "0.weight", part) > 0).all()) for part in "AB")


def work(rank):
    torch.manual_seed(0)
    model = lr.add_lora_(chain(8, 8, 6), rank=4, seed=0)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(lr.lora_parameters(model), lr=0.01)
    allocator = lr.LoraRankAllocator(model, 2, start=2, stop=10)
    for t in range(12):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * t + rank))
        (wrapped(x) - x[:, :6]).square().mean().backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    allocator.finish(optimizer)
    return allocator.ranks(), model.state_dict()


def test_two_processes_choose_the_same(tmp_path):
    (ranks, state), (others, other) = run_processes(work, tmp_path)
    assert ranks == others
    assert sum(ranks.values()) == 4
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def made(model, *args, **settings):
    return lr.LoraRankAllocator(model, *(args or (1,)), **{"start": 1, "stop": 4, **settings})


def early(model):
    allocator = made(model)
    allocator.step()
    allocator.finish()


def twice(model):
    allocator = allocated(model, 1)
    allocator.finish()
    allocator.finish()


def of_another_shape(model):
    other = lr.add_lora_(chain(8, 6, 5), rank=2)
    made(model).load_state_dict(made(other).state_dict())


def taken_off(model):
    allocator = made(model)
    lr.remove_lora_(model)
    allocator.step()


def adafactor(model):
    optimizer = torch.optim.Adafactor(lr.lora_parameters(model))
    allocator = made(model)
    for _ in range(4):
        model(torch.randn(2, 8)).sum().backward()
        optimizer.step()
        allocator.step()
    allocator.finish(optimizer)


BAD = {
    "no adapters": (lambda m: made(lr.remove_lora_(m)), "add_lora_ first"),
    "two adapters": (lambda m: made(lr.add_lora_(m, rank=2, name="b")), "give the name"),
    "an unknown adapter": (lambda m: made(m, name="b"), "'b'"),
    "merged": (lambda m: made(lr.merge_lora_(m)), "unmerge_lora_"),
    "merged later": (lambda m: (made(m), lr.merge_lora_(m))[0].step(), "unmerge_lora_"),
    "taken off": (taken_off, "another than at the start"),
    "above what there is": (lambda m: made(m, 4), "greater rank"),
    "nothing left": (lambda m: made(m, 0.1), "0 directions"),
    "rank 0": (lambda m: made(m, 0), "rank=0"),
    "rank nan": (lambda m: made(m, float("nan")), "rank=nan"),
    "rank True": (lambda m: made(m, True), "rank=True"),
    "start below 0": (lambda m: made(m, start=-1), "start=-1"),
    "stop before start": (lambda m: made(m, start=4), "start before stop"),
    "half a step": (lambda m: made(m, stop=4.5), r"stop=4\.5"),
    "every 0": (lambda m: made(m, every=0), "every=0"),
    "beta 1": (lambda m: made(m, beta1=1), "beta1=1"),
    "beta 0": (lambda m: made(m, beta2=0.0), "beta2"),
    "finish before stop": (early, "1 of 4 steps"),
    "finish twice": (twice, "before"),
    "an optimizer of another model": (
        lambda m: allocated(m, 1).finish(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        "none of the adapter",
    ),
    "an optimizer whose state has other shapes": (adafactor, "row_var"),
    "the state of other adapters": (of_another_shape, "same adapters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case):
    attempt, word = BAD[case]
    model = lr.add_lora_(chain(8, 8, 6), rank=3)
    with pytest.raises(lr.LowRankError, match=word):
        attempt(model)
    assert all(adapter.B.shape[1] == 3 for adapter, _ in adapters(model).values()) or case == "finish twice"
