"""Ranks allocated under a global budget: the paper's equations, the peer's numbers, a task whose ranks are known."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr
from lowrank_layers.lora.adapted_weight import BANK, banks_of
from tests.processes import run_processes

from . import test_adapters
from .peer import peft
from .test_adapters import everything, run, scramble


class Stacked(nn.Module):
    """Three matrices in one parameter, as experts are kept."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8) / 8)

    def forward(self, x):
        return torch.einsum("ni,koi->nko", x, self.up)


MODELS = test_adapters.MODELS | {"stacked": (lambda: nn.Sequential(nn.Linear(8, 8), Stacked()), (4, 8))}


def make(name):
    build, shape = MODELS[name]
    return build().eval(), torch.randint(9, (2, 5)) if shape is None else torch.randn(shape)


def adapters(model, name="default"):
    return {
        f"{owner}.{key}" if owner else key: (bank.adapters[name], bank.kind)
        for owner, module in model.named_modules()
        for key, bank in banks_of(module).items()
        if name in bank.adapters
    }


@torch.no_grad()
def pretend(model, generator, strength=lambda label: 1.0, rate=0.01):
    """Random gradients, and one step along them."""
    for label, (adapter, _) in adapters(model).items():
        for p in (adapter.A, adapter.B):
            if p.requires_grad:
                p.grad = (torch.randn(p.shape, generator=generator) * strength(label)).to(p)
                p -= rate * p.grad


def allocated(model, rank, stop=6, strength=lambda label: 1.0, **settings):
    """An allocator that has reached its budget."""
    allocator = lr.LoraRankAllocator(model, rank, start=1, stop=stop, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(stop):
        pretend(model, generator, strength)
        allocator.step()
    return allocator


def favouring(*labels):
    return lambda label: 10.0 if label in labels else 0.1


def chain(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


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
    allocator = lr.LoraRankAllocator(model, 1, start=9, stop=10, beta1=b1, beta2=b2)
    generator = torch.Generator().manual_seed(0)
    smooth, unsure = {}, {}
    for _ in range(4):
        pretend(model, generator)
        allocator.step()
        for label, (adapter, _) in adapters(model).items():
            for part, p in (("A", adapter.A), ("B", adapter.B)):
                now = (p.detach().double() * p.grad.double()).abs()
                key = label, part
                smooth[key] = b1 * smooth.get(key, 0) + (1 - b1) * now
                unsure[key] = b2 * unsure.get(key, 0) + (1 - b2) * (now - smooth[key]).abs()
    for label, (adapter, kind) in adapters(model).items():
        scores = allocator._watched[label].scores()
        a, b = (smooth[label, part] * unsure[label, part] for part in "AB")
        for i, score in enumerate(scores.tolist()):
            row, column = entries(adapter, kind, a, b, i)
            assert score == pytest.approx(float(row.mean() + column.mean()), rel=1e-5)


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
            for label, each in ours._watched.items():
                assert chosen[f"{label.replace('.', '_')}.lora_E.default"] == each.kept.tolist()
    for label, each in ours._watched.items():
        a, b = (theirs._element_score(f"{label.replace('.', '_')}.lora_{k}.default") for k in "AB")
        assert torch.allclose(each.scores(), a.mean(1) + b.mean(0), rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cutting_leaves_the_outputs_and_the_budget(name, dtype):
    model, x = make(name)
    lr.add_lora_(model, everything, rank=1 if name == "depthwise" else 2, alpha=5)
    scramble(model)
    model.to(dtype)
    x = x if x.dtype == torch.long else x.to(dtype)
    scalings = {label: float(adapter.scaling) for label, (adapter, _) in adapters(model).items()}
    allocator = allocated(model, 1)
    ranks, out = allocator.ranks(), run(model, x)
    allocator.finish()
    tight = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(run(model, x).float(), out.float(), atol=tight, rtol=tight)
    left = adapters(model)
    assert {label: len(kind.directions(a.A, a.B)[1]) for label, (a, kind) in left.items()} == {
        label: rank for label, rank in ranks.items() if rank
    }
    assert all(float(adapter.scaling) == scalings[label] for label, (adapter, _) in left.items())
    assert all(adapter.A.is_contiguous() and adapter.B.is_contiguous() for adapter, _ in left.values())
    model.to(torch.float32)
    run(model, x if x.dtype == torch.long else x.float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in lr.lora_parameters(model))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dropped_direction_goes_back_to_its_start_and_the_base_keeps_it(init):
    model, x = chain(8, 8, 6), torch.randn(4, 8)
    base = [layer.weight.detach().clone() for layer in model]
    lr.add_lora_(model, rank=5, init=init)
    allocator = allocated(model, 2)
    for k, (adapter, _) in enumerate(adapters(model).values()):
        kept = allocator._watched[f"{k}.weight"].kept
        assert torch.equal(adapter.A[~kept], adapter.a0[~kept])
        assert torch.equal(adapter.B[:, ~kept], adapter.b0[:, ~kept])
        moved = adapter.B[:, kept] @ adapter.A[kept] - adapter.b0[:, kept] @ adapter.a0[kept]
        assert torch.allclose(model[k].weight, base[k] + float(adapter.scaling) * moved, atol=1e-5)
    out = model(x)
    allocator.finish()
    assert torch.allclose(model(x), out, atol=1e-5)
    assert sum(len(adapter.a0) for adapter, _ in adapters(model).values()) == 4


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


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed", "embedding", "stacked"])
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_the_optimizer_goes_on_as_if_nothing_had_been_cut(name, which):
    model, x = make(name)
    lr.add_lora_(model, everything, rank=2, seed=0)
    scramble(model)
    optimizer = OPTIMIZERS[which](lr.lora_parameters(model, lr=1e-3))
    allocator = lr.LoraRankAllocator(model, 1, start=1, stop=3)

    def learn(model, optimizer):
        optimizer.zero_grad()
        run(model, x).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        learn(model, optimizer)
        allocator.step()
    masked, same, other = copy.deepcopy((model, optimizer, allocator))
    allocator.finish(optimizer)
    counts = [len(group["params"]) for group in optimizer.param_groups]
    assert counts == [len(adapters(model))] * 2
    for _ in range(3):
        learn(model, optimizer)
        learn(masked, same)
        other.step()
    for label, (adapter, kind) in adapters(model).items():
        index = other._watched[label].kept.nonzero().flatten()
        before = adapters(masked)[label][0]
        for got, whole in zip(kind.directions(adapter.A, adapter.B), kind.directions(before.A, before.B), strict=True):
            assert torch.allclose(got, whole[index], atol=1e-6)


def test_names_of_an_optimizers_parameters_stay_in_step():
    model = lr.add_lora_(chain(6, 6, 6), rank=2)
    scramble(model)
    optimizer = torch.optim.SGD([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.1)
    allocated(model, 1, strength=favouring("1.weight")).finish(optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


def test_a_weight_without_directions_is_plain_again(tmp_path):
    base, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(4, 8)
    model = lr.add_lora_(copy.deepcopy(base), rank=4, alpha=6)
    scramble(model)
    allocator = allocated(model, 2, strength=favouring("0.weight", "2.weight"))
    out, ranks = model(x), allocator.ranks()
    assert allocator.finish() is model
    assert ranks == allocator.ranks()
    assert ranks["4.weight"] == 0
    assert ranks["0.weight"] + ranks["2.weight"] == 6
    assert type(model[4]) is nn.Linear
    assert not any("lora" in key for key in model[4].__dict__)
    assert not model[4].weight.requires_grad
    assert torch.allclose(model(x), out, atol=1e-6)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(lr.load_lora(copy.deepcopy(base), tmp_path)(x), out, atol=1e-5)
    assert torch.allclose(lr.remove_lora_(model)(x), base(x))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_peer_reads_what_is_left(init, rslora, tmp_path):
    library = peft()

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 5))

    model, x = lr.add_lora_(build(), rank=5, alpha=7, rslora=rslora, init=init), torch.randn(4, 8)
    allocator = allocated(model, 1.75, strength=favouring("0.weight", "2.weight"))
    out = model(x)
    allocator.finish()
    lr.save_lora(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.allclose(theirs(x), out, atol=1e-5)
    left = {label.removesuffix(".weight") for label, rank in allocator.ranks().items() if rank}
    assert left < {"0", "2", "4", "5"}
    wrapped = {name for name, module in theirs.base_model.model.named_children() if hasattr(module, "lora_A")}
    assert wrapped == left


@pytest.mark.parametrize("setting", ["dora", "bias"])
def test_what_is_learned_beside_the_product_outlives_its_last_direction(setting):
    model, x = lr.add_lora_(chain(8, 8, 6), rank=3, **{setting: True}), torch.randn(4, 8)
    scramble(model)
    with torch.no_grad():
        for adapter, _ in adapters(model).values():
            (adapter.magnitude if setting == "dora" else adapter.bias).normal_()
    allocator = allocated(model, 1, strength=favouring("0.weight"))
    out = model(x)
    allocator.finish()
    assert allocator.ranks()["1.weight"] == 0
    assert model[1].lora_weight.adapters["default"].A.shape == (1, 8)
    assert torch.allclose(model(x), out, atol=1e-6)


def test_only_the_named_adapter_is_watched_masked_and_cut():
    model, x = lr.add_lora_(chain(8, 8, 6), rank=3, name="other"), torch.randn(4, 8)
    lr.add_lora_(model, rank=4)
    scramble(model)
    before = {key: value.clone() for key, value in model.state_dict().items() if ".other." in key}
    allocator = allocated(model, 1, name="default", strength=favouring("0.weight"))
    out = model(x)
    allocator.finish()
    assert torch.allclose(model(x), out, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert list(model[1].lora_weight.adapters) == ["other"]
    assert model[1].lora_weight.gates.tolist() == [1.0]


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
    assert bool((allocator._watched["0.weight"].scores() > 0).all())


def test_a_frozen_a_is_judged_by_b_alone():
    model, x = lr.add_lora_(chain(8, 8, 6), rank=3, freeze_a=True), torch.randn(4, 8)
    scramble(model)
    allocator = allocated(model, 1.5)
    assert not bool(allocator.state_dict()["0.weight.A.sensitivity"].any())
    out = model(x)
    allocator.finish()
    assert torch.allclose(model(x), out, atol=1e-6)
    assert not any(adapter.A.requires_grad for adapter, _ in adapters(model).values())


def test_a_projection_of_a_fused_attention_may_lose_its_adapter():
    model, x = make("encoder layer")
    lr.add_lora_(model, ["q_proj", "v_proj"], rank=2)
    scramble(model)
    allocator = allocated(model, 1, strength=favouring("self_attn.v_proj"))
    out = run(model, x)
    allocator.finish()
    assert allocator.ranks() == {"self_attn.q_proj": 0, "self_attn.v_proj": 2}
    assert not hasattr(model.self_attn, BANK.format("q_proj"))
    assert torch.allclose(run(model, x), out, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(run(model, x), out, atol=1e-5)


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
