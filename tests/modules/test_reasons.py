from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import reasons_to_keep


def test_tied_weights_stay_tied_and_dense_with_a_reason():
    model = nn.ModuleDict({"embed": nn.Embedding(30, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 30, bias=False)})
    model["head"].weight = model["embed"].weight
    plan = lr.make_plan(model, rank=2)
    assert "tied to 'head'" in plan.skipped["embed"]
    assert "tied to 'embed'" in plan.skipped["head"]
    lr.factorize_(model, plan)
    assert model["head"].weight is model["embed"].weight


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
