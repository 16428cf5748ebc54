import pytest
import torch
from torch import nn

import lowrank_layers as lr


def open_attention() -> nn.Module:
    return nn.ModuleDict({"attention": lr.LowRankMultiheadAttention(8, 2, rank=[None, None, 3, None])})


def output(model: nn.Module) -> torch.Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return model["attention"](x, x, x)[0]


def test_an_open_attention_is_closed_with_its_factors_multiplied_out():
    model = open_attention()
    expected = output(model)
    assert lr.densify_(model) is model
    assert type(model["attention"]) is nn.MultiheadAttention
    assert torch.allclose(output(model), expected, atol=1e-6)


def test_an_attention_with_adapters_stays_open_and_keeps_them():
    model = open_attention()
    lr.add_lora_(model, ["q_proj"], rank=2)
    for parameter in lr.lora_parameters(model):
        nn.init.normal_(parameter)
    expected, count = output(model), len(list(lr.lora_parameters(model)))
    lr.densify_(model)
    assert type(model["attention"].v_proj) is nn.Linear
    assert len(list(lr.lora_parameters(model))) == count > 0
    assert torch.allclose(output(model), expected, atol=1e-6)
    lr.densify_(lr.remove_lora_(model))
    assert type(model["attention"]) is nn.MultiheadAttention


def test_adapters_on_factors_are_refused():
    model = lr.add_lora_(nn.Sequential(lr.LowRankLinear(8, 8, rank=3)), rank=2)
    with pytest.raises(lr.LowRankError, match="'0'"):
        lr.densify_(model)
    assert len(list(lr.lora_parameters(model))) == 2


def test_a_dense_model_comes_back_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(8, 2))
    before = list(model.modules())
    assert list(lr.densify_(model).modules()) == before
