import pytest
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import opened_attentions, select, walk_layers


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"enc": nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1)), "fc": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        ("fc", {"fc"}),
        ("enc.0", {"enc.0"}),
        ("0", {"enc.0"}),
        ("enc", {"enc", "enc.0", "enc.1"}),
        (nn.Conv2d, {"enc.1"}),
        (lambda name, module: name.endswith("1"), {"enc.1"}),
    ],
    ids=["name", "parent and name", "end of a name", "parent", "type", "predicate"],
)
def test_names_ends_parents_types_and_predicates(model, selector, taken):
    assert select(model, [selector], "skip") == taken


def test_all_names_of_a_shared_module_take_it(model):
    model["again"] = model["enc"]
    assert select(model, ["again.0"], "skip") == {"enc.0"}


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ("fc", r"skip: got 'fc', expected a list; write \['fc'\]"),
        (nn.Linear, "skip: got .*Linear.*expected a list"),
        (["encc.0"], r"skip: 'encc\.0' matches no module of the model\. Did you mean 'enc\.0'"),
        ([nn.Embedding], "matches no module"),
        ([3], "got selector 3, expected a name, a type or a predicate"),
    ],
)
def test_what_selects_nothing_is_refused(model, selectors, message):
    with pytest.raises(lr.LowRankError, match=message):
        select(model, selectors, "skip")


def test_who_takes_an_attention_takes_its_projections():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    closed = list(walk_layers(model))
    inside = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    with opened_attentions(model):
        assert select(model, [nn.MultiheadAttention], "skip", closed) == {"attention", *inside}
        assert select(model, ["attention"], "skip", closed) == {"attention", *inside}
        assert select(model, ["q_proj"], "skip", closed) == {"attention.q_proj"}
