"""What is low-rank in a model goes through JSON and makes another dense model the same."""

import json

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import ModelDescription, replace_


def dense() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 6, bias=False))


def factored() -> nn.Module:
    model = dense()
    plan = lr.make_plan(model, rank=2, skip=["0.self_attn.k_proj"])
    return lr.factorize_(model, plan)


def through_json(model: nn.Module) -> ModelDescription:
    return ModelDescription.from_json(json.loads(json.dumps(ModelDescription.of(model).to_json())))


def test_a_dense_model_becomes_the_described_one():
    model, other = factored(), dense()
    description = through_json(model)
    assert description == ModelDescription.of(model)
    assert description.opened == ("0.self_attn",)
    replace_(other, description.build(other))
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_building_changes_nothing_and_leaves_out_what_is_there():
    model, other = factored(), dense()
    before = list(other.modules())
    assert set(ModelDescription.of(model).build(other)) == {"0.self_attn", "0.linear1", "0.linear2", "1"}
    assert list(other.modules()) == before
    assert ModelDescription.of(model).build(model) == {}
    assert ModelDescription.of(dense()).build(other) == {}


def test_a_description_is_the_one_of_the_plan():
    model = factored()
    plan = lr.Plan.from_model(model)
    layers = ModelDescription.of(model).layers
    assert [entry.name for entry in plan] == list(layers)
    for entry in plan:
        spec = layers[entry.name]
        assert (entry.rank, entry.bias, entry.layer) == (spec.rank, spec.bias, spec.dense)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(8, 6)), "'0.self_attn': is an open attention, but the model has no such module"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), "'1': the model has no such layer"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Conv1d(8, 6, 1)), "'1': replaces nn.Linear, but the"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), nn.Linear(8, 7)), "'1': was saved with out_features 6"),
        (
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8), lr.LowRankLinear(8, 6, rank=1)),
            "'1': is LowRankLinear of",
        ),
    ],
)
def test_another_model_is_refused_and_stays_as_it_is(other, message):
    before = list(other.modules())
    with pytest.raises(lr.LowRankError, match=message):
        ModelDescription.of(factored()).build(other)
    assert list(other.modules()) == before


def hooked() -> nn.Module:
    model = dense()
    model[0].self_attn.out_proj.register_forward_hook(lambda *_: None)
    return model


def tied() -> nn.Module:
    model = dense()
    model.append(nn.Linear(8, 24))
    model[2].weight = model[0].self_attn.in_proj_weight
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (hooked, "'0.self_attn': cannot be opened: it carries hooks"),
        (tied, "cannot be opened: its parameters are tied"),
    ],
)
def test_attentions_that_cannot_be_opened_are_refused(build, message):
    model = build()
    with pytest.raises(lr.LowRankError, match=message):
        ModelDescription.of(factored()).build(model)
    assert type(model[0].self_attn) is nn.MultiheadAttention
