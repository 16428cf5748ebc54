"""Cutting out the directions that were dropped: outputs, optimizers and files stay as they were."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .allocation import MODELS, adapters, allocated, chain, favouring, kept, make
from .peer import peft
from .test_adapters import everything, run, scramble


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
        index = kept(other, label).nonzero().flatten()
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


def test_only_the_named_adapter_is_masked_and_cut():
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


def test_a_projection_of_a_fused_attention_may_lose_its_adapter():
    model, x = make("encoder layer")
    lr.add_lora_(model, ["q_proj", "v_proj"], rank=2)
    scramble(model)
    allocator = allocated(model, 1, strength=favouring("self_attn.v_proj"))
    out = run(model, x)
    allocator.finish()
    assert allocator.ranks() == {"self_attn.q_proj": 0, "self_attn.v_proj": 2}
    assert not hasattr(model.self_attn, "lora_q_proj")
    assert torch.allclose(run(model, x), out, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(run(model, x), out, atol=1e-5)


def test_a_frozen_a_is_judged_by_b_alone():
    model, x = lr.add_lora_(chain(8, 8, 6), rank=3, freeze_a=True), torch.randn(4, 8)
    scramble(model)
    allocator = allocated(model, 1.5)
    assert not bool(allocator.state_dict()["0.weight.A.sensitivity"].any())
    out = model(x)
    allocator.finish()
    assert torch.allclose(model(x), out, atol=1e-6)
    assert not any(adapter.A.requires_grad for adapter, _ in adapters(model).values())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_dropped_direction_goes_back_to_its_start_and_the_base_keeps_it(init):
    model, x = chain(8, 8, 6), torch.randn(4, 8)
    base = [layer.weight.detach().clone() for layer in model]
    lr.add_lora_(model, rank=5, init=init)
    allocator = allocated(model, 2)
    for k, (adapter, _) in enumerate(adapters(model).values()):
        left = kept(allocator, f"{k}.weight")
        assert torch.equal(adapter.A[~left], adapter.a0[~left])
        assert torch.equal(adapter.B[:, ~left], adapter.b0[:, ~left])
        moved = adapter.B[:, left] @ adapter.A[left] - adapter.b0[:, left] @ adapter.a0[left]
        assert torch.allclose(model[k].weight, base[k] + float(adapter.scaling) * moved, atol=1e-5)
    out = model(x)
    allocator.finish()
    assert torch.allclose(model(x), out, atol=1e-5)
    assert sum(len(adapter.a0) for adapter, _ in adapters(model).values()) == 4
