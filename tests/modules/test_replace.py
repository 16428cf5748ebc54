import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import reasons_to_keep, replace_, select


def test_a_shared_module_is_replaced_in_all_its_parents():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared)})
    plan = lr.make_plan(model, rank=2)
    assert len(plan) == 1
    lr.factorize_(model, plan)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], lr.LowRankLinear)
    lr.densify_(model)
    assert model["a"][0] is model["b"][0]


def test_tied_weights_stay_tied_and_dense_with_a_reason():
    model = nn.ModuleDict({"table": nn.Embedding(30, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 30, bias=False)})
    model["head"].weight = model["table"].weight
    plan = lr.make_plan(model, rank=2)
    assert "tied to 'head'" in plan.skipped["table"]
    assert "tied to 'table'" in plan.skipped["head"]
    lr.factorize_(model, plan)
    assert model["head"].weight is model["table"].weight


def test_an_attention_that_cannot_be_opened_stays_dense_with_a_reason():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(16, 2), "hooked": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 16)})
    model["hooked"].register_forward_hook(lambda *_: None)
    assert set(reasons_to_keep(model)) == {"own.out_proj", "hooked", "hooked.out_proj"}
    plan = lr.make_plan(model, rank=2)
    assert [entry.name for entry in plan] == ["fc"]
    assert "a subclass of nn.MultiheadAttention" in plan.skipped["own"]
    assert "hooks" in plan.skipped["hooked"]
    assert "reads out_proj.weight itself" in plan.skipped["own.out_proj"]


def test_parametrized_and_hooked_layers_stay_dense_with_a_reason():
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), hooked, nn.Linear(4, 4))
    plan = lr.make_plan(model, rank=1)
    assert [entry.name for entry in plan] == ["2"]
    assert "parametri" in plan.skipped["0"]
    assert "hooks" in plan.skipped["1"]


def test_select_takes_names_ends_parents_types_and_predicates():
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1)), "fc": nn.Linear(4, 4)})
    assert select(model, ["fc"], "skip") == {"fc"}
    assert select(model, ["enc.0"], "skip") == {"enc.0"}
    assert select(model, ["0"], "skip") == {"enc.0"}
    assert select(model, ["enc"], "skip") == {"enc", "enc.0", "enc.1"}
    assert select(model, [nn.Conv2d], "skip") == {"enc.1"}
    assert select(model, [lambda name, module: name.endswith("1")], "skip") == {"enc.1"}


def test_replace_resolves_places_before_it_changes_any():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    new = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(lr.LowRankError):
        replace_(model, {"0": new[0], "7": new[1]})
    assert model[0] is not new[0]


def test_optimizer_groups_follow_the_layers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].bias]["momentum_buffer"].clone()
    lr.factorize_(model, lr.make_plan(model, rank=2, skip=["1"]), optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model[0].parameters()}
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state[model[0].up.bias]["momentum_buffer"], momentum)
    before = copy.deepcopy(model[0].down.weight)
    optimizer.zero_grad()
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].down.weight)


def decay_groups(model):
    """Weights with weight decay, biases without: the usual two groups."""
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


@pytest.mark.parametrize("back", [False, True], ids=["factorize", "densify"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3)),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)),
    ],
    ids=["layers", "attention"],
)
def test_weights_and_biases_in_two_groups_stay_there(build, back):
    model = build()
    optimizer = torch.optim.SGD(decay_groups(model), lr=0.1)
    lr.factorize_(model, lr.make_plan(model, rank=2), optimizer=optimizer)
    if back:
        lr.densify_(model, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})  # else a step would be taken twice
    for group, expected in zip(optimizer.param_groups, decay_groups(model), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in expected["params"]}


def test_remap_leaves_frozen_parameters_out():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    replace_(model, {"0": lr.LowRankLinear(4, 4, rank=1)}, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1
