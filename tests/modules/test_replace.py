import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import replace_


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


def test_replace_resolves_places_before_it_changes_any():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    new = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(lr.LowRankError):
        replace_(model, {"0": new[0], "7": new[1]})
    assert model[0] is not new[0]


@pytest.mark.parametrize(("name", "message"), [("", "the model itself is the Sequential"), ("7", "no module '7'")])
def test_names_that_cannot_be_replaced_are_refused(name, message):
    with pytest.raises(lr.LowRankError, match=message):
        replace_(nn.Sequential(nn.Linear(2, 2)), {name: nn.Linear(2, 2)})


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder.self_attn = self.first


@pytest.mark.parametrize("name", ["first", "encoder.self_attn"])
def test_replacing_a_projection_opens_the_attention_under_all_its_names(name):
    model = TwoNames().eval()
    x = torch.randn(2, 3, 8)
    expected = model.encoder(x)
    q_proj = lr.LowRankMultiheadAttention.from_dense(model.first, rank=None).q_proj
    new = lr.LowRankLinear.from_dense(q_proj, rank=8)
    replace_(model, {f"{name}.q_proj": new})
    assert model.first is model.encoder.self_attn
    assert model.first.q_proj is new
    assert torch.allclose(model.encoder(x), expected, atol=1e-5)
    with torch.no_grad():
        new.up.weight.zero_()
    assert not torch.allclose(model.encoder(x), expected, atol=1e-5)  # the fast path is off


def test_a_projection_of_an_attention_that_cannot_be_opened_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(lr.LowRankError, match="'0': the attention cannot be opened"):
        replace_(model, {"0.out_proj": nn.Linear(8, 8)})
    assert type(model[0]) is nn.MultiheadAttention
