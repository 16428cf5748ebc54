"""What an instance does differently from its class is honoured or the layer stays dense: every layer, every way."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.layers.instance_checks import peculiarity

from .tables import LAYERS

rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def replaced_forward(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda *inputs: 3 * plain(*inputs)


def bound_forward(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, *inputs: 3 * type(self).forward(self, *inputs), layer)


def accelerate_hook(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Triples(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 3 * output

    hooks.add_hook_to_module(layer, Triples())


def own_call(layer: nn.Module) -> None:
    layer._call_impl = lambda *inputs: 3 * layer.forward(*inputs)


def own_class(layer: nn.Module) -> None:
    layer.__class__ = type(
        "Tripled", (type(layer),), {"forward": lambda self, *x: 3 * type(self).__base__.forward(self, *x)}
    )


def forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)


def gradient_hook(layer: nn.Module) -> None:
    layer.weight.register_hook(lambda gradient: 3 * gradient)


def gradient_hook_after_accumulation(layer: nn.Module) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def more_parameters(layer: nn.Module) -> None:
    layer.scale = nn.Parameter(torch.ones(()))


def more_buffers(layer: nn.Module) -> None:
    layer.register_buffer("seen", torch.zeros(()))


def more_children(layer: nn.Module) -> None:
    layer.inner = nn.Identity()


def set_method(layer: nn.Module) -> None:
    layer.describe = types.MethodType(lambda self: "mine", layer)


def compiled_by_itself(layer: nn.Module) -> None:
    layer.compile(backend="eager")


WAYS: dict[Callable[[nn.Module], None], str] = {
    replaced_forward: "its forward was replaced on this instance",
    bound_forward: "its forward was replaced on this instance",
    accelerate_hook: r"hook of accelerate; call accelerate\.hooks\.remove_hook_from_submodules",
    own_call: "its _call_impl was replaced on this instance",
    own_class: "a subclass of|no method for",
    forward_hook: "carries hooks",
    gradient_hook: "its weight carries a gradient hook",
    gradient_hook_after_accumulation: "its weight carries a gradient hook",
    more_parameters: "it holds 'scale'",
    more_buffers: "it holds 'seen'",
    more_children: "it holds 'inner'",
    set_method: "its method describe was set on this instance",
    compiled_by_itself: "compiled by itself",
}
ways = pytest.mark.parametrize(("change", "why"), WAYS.items(), ids=lambda each: getattr(each, "__name__", ""))
ON_FACTORED = (replaced_forward, bound_forward, accelerate_hook, own_call, forward_hook, set_method)


def model_of(layer: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([layer, nn.Linear(8, 8)])


@rows
@ways
def test_the_layer_stays_dense_and_the_plan_says_why(row, change, why):
    layer = row.dense()
    before = lr.make_plan(model_of(layer), rank=1)
    x = row.input(layer)
    change(layer)
    expected = layer(x)
    model = model_of(layer)
    plan = lr.make_plan(model, rank=1)
    assert [entry.name for entry in plan] == ["1"]
    with pytest.raises(lr.LowRankError, match=why):
        plan["0"]
    lr.factorize_(model, plan)
    assert model[0] is layer
    assert torch.equal(layer(x), expected)
    again = model_of(layer)
    with pytest.raises(lr.LowRankError, match="'0'"):  # by a plan made before
        lr.factorize_(again, before)
    assert again[0] is layer
    assert type(again[1]) is nn.Linear


@rows
@pytest.mark.parametrize(
    "change", [replaced_forward, bound_forward, accelerate_hook, own_call, own_class, more_buffers]
)
def test_from_dense_refuses_it(row, change):
    layer = row.dense()
    change(layer)
    with pytest.raises(lr.UnsupportedLayerError, match=row.cls.__name__):
        row.from_dense(layer, rank=row.small)


@rows
@ways
def test_a_file_is_not_loaded_over_it(row, change, why, tmp_path):
    lr.save(nn.Sequential(row.fresh()), tmp_path / "small.safetensors")
    layer = row.dense()
    change(layer)
    model = nn.Sequential(layer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(lr.CheckpointError, match="'0'"):
        lr.load(tmp_path / "small.safetensors", into=model)
    assert model[0] is layer
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@rows
@pytest.mark.parametrize("change", ON_FACTORED)
@pytest.mark.parametrize("inside", [False, True], ids=["layer", "child"])
def test_a_factored_layer_is_not_multiplied_out_without_it(row, change, inside):
    layer = row.fresh()
    change(layer.last if inside else layer)
    model = nn.Sequential(lr.LowRankLinear(4, 4, rank=1), layer)
    with pytest.raises(lr.LowRankError, match=r"'1'.*cannot be multiplied out"):
        lr.densify_(model)
    assert isinstance(model[0], lr.LowRankLinear)
    assert model[1] is layer


@rows
def test_settings_that_do_not_fit_the_weight_are_named(row):
    layer = row.dense()
    layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight]))
    plan = lr.make_plan(model_of(layer), rank=1)
    with pytest.raises(lr.LowRankError, match=r"its weight has shape .* but its settings say"):
        plan["0"]


def test_convolutions_whose_settings_were_changed_afterwards():
    """Torch reads the padding of "reflect" from what the constructor made of it, the strides where they stand."""
    padded = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    padded.padding = (2, 2)
    strided = nn.Conv2d(3, 4, 3)
    strided.stride = 2
    honoured = nn.Conv2d(3, 4, 3, padding=1)
    honoured.padding, honoured.stride = (2, 2), (2, 2)
    model = nn.ModuleList([padded, strided, honoured])
    x = torch.randn(1, 3, 8, 8)
    expected = [layer(x) for layer in model]
    plan = lr.make_plan(model, rank=100, methods=[lr.SVDMethod()])
    assert [entry.name for entry in plan] == ["2"]
    assert "_reversed_padding" in plan.skipped["0"]
    assert "its stride is 2" in plan.skipped["1"]
    lr.factorize_(model, plan)
    for layer, want in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(x), want)


@rows
def test_a_hook_that_accelerate_has_removed_is_no_reason(row):
    hooks = pytest.importorskip("accelerate.hooks")
    layer = row.dense()
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    hooks.remove_hook_from_module(layer)
    assert "forward" in vars(layer)
    assert peculiarity(layer) is None
    assert row.from_dense(layer, rank=row.small).forward.__func__ is row.cls.forward


@rows
def test_attributes_that_change_nothing_are_carried_there_and_back(row):
    layer = row.dense()
    layer.tag, layer.moment, layer._is_hf_initialized = ["mine"], torch.ones(3), True
    model = nn.Sequential(layer)
    factored = row.from_dense(layer, rank=row.small)
    assert factored.tag is layer.tag
    assert factored._is_hf_initialized
    assert factored.to_dense().tag is layer.tag
    lr.factorize_(model, lr.make_plan(model, rank=1))
    assert model[0] is not layer
    assert model[0].tag is layer.tag
    assert lr.densify_(model)[0].tag is layer.tag
    assert set(vars(model[0])) == set(vars(layer))


ON_ATTENTION = [replaced_forward, bound_forward, accelerate_hook, forward_hook, more_parameters, set_method]


@pytest.mark.parametrize("change", ON_ATTENTION)
@pytest.mark.parametrize("inside", [False, True], ids=["attention", "out_proj"])
def test_an_attention_stays_closed(change, inside, tmp_path):
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    before = lr.make_plan(model, rank=2)
    lr.save(lr.factorize_(copy.deepcopy(model), before), tmp_path / "small.safetensors")
    attention = model[0]
    change(attention.out_proj if inside else attention)
    plan = lr.make_plan(model, rank=2)
    assert [entry.name for entry in plan] == ["1"]
    assert all(plan.skipped[name] for name in ("0", "0.out_proj"))
    for act in (lambda: lr.factorize_(model, before), lambda: lr.load(tmp_path / "small.safetensors", into=model)):
        with pytest.raises(lr.LowRankError, match="'0"):
            act()
    assert list(model) == [attention, model[1]]
    assert type(model[1]) is nn.Linear


def test_attributes_of_an_attention_are_carried_there_and_back():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    model[0].tag = "mine"
    keys = set(vars(model[0]))
    lr.factorize_(model, lr.make_plan(model, rank=2))
    assert isinstance(model[0], lr.LowRankMultiheadAttention)
    assert model[0].tag == "mine"
    assert set(vars(lr.densify_(model)[0])) == keys
    assert model[0].tag == "mine"


@pytest.mark.parametrize("change", ON_FACTORED)
@pytest.mark.parametrize("part", ["", "q_proj", "out_proj"])
def test_an_open_attention_is_not_closed_without_it(change, part):
    model = nn.Sequential(lr.LowRankMultiheadAttention(8, 2, rank=(None, 2, 2, None)), lr.LowRankLinear(8, 8, rank=2))
    change(model[0].get_submodule(part))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(lr.LowRankError, match="cannot be multiplied out"):
        lr.densify_(model)
    assert [type(module) for module in model.modules()] == kinds


def test_conv1d_of_transformers_is_looked_at_as_torchs_layers_are():
    import_torchvision()
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layers = nn.ModuleList([Conv1D(6, 8), Conv1D(6, 8)])
    layers[1].tag = "mine"
    replaced_forward(layers[0])
    plan = lr.make_plan(layers, rank=2)
    assert plan.skipped == {"0": "its forward was replaced on this instance"}
    lr.factorize_(layers, plan)
    assert layers[1].tag == "mine"
    with pytest.raises(lr.LowRankError, match="LowRankTransposedLinear: its weight is multiplied out"):
        layers[1].weight.data.zero_()
