"""Modules that were changed on the instance: patched forwards, accelerate's hooks, weights without values."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .test_adapters import MODELS, everything, make, models, scramble

ROUND = {"atol": 1e-5}


def tripled(layer):
    """As users wrap a layer: whatever it computed, times three."""
    old = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * old(*args, **kwargs)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), torch.randn(4, 8)),
    "conv": (lambda: nn.Conv1d(3, 4, 3), torch.randn(4, 3, 9)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 3), torch.randn(4, 3, 9)),
    "embedding": (lambda: nn.Embedding(9, 6), torch.randint(9, (4, 5))),
    "bag": (lambda: nn.EmbeddingBag(9, 6), torch.randint(9, (4, 5))),
}
layers = pytest.mark.parametrize("kind", LAYERS)


@layers
@pytest.mark.parametrize("after", [False, True], ids=["patched first", "patched later"])
def test_a_patched_forward_is_kept_with_the_adapter_inside(kind, after):
    build, x = LAYERS[kind]
    plain = build()
    model = nn.Sequential(copy.deepcopy(plain))
    if not after:
        tripled(model[0])
    lr.add_lora_(model, everything, rank=2)
    scramble(model)
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    if after:
        tripled(model[0])
    assert torch.allclose(model(x), 3 * plain(x), **ROUND)
    lr.merge_lora_(model)
    assert torch.allclose(model(x), 3 * plain(x), **ROUND)
    lr.merge_lora_(model, unload=True)
    assert type(model[0]) is type(plain)
    assert torch.allclose(model(x), 3 * plain(x), **ROUND)


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"bias": True}], ids=str)
def test_what_a_patched_forward_would_drop_is_refused(settings):
    model = nn.Sequential(tripled(nn.Linear(8, 6)))
    with pytest.raises(lr.LowRankError, match="replaced on the instance"):
        lr.add_lora_(model, rank=2, **settings)
    assert type(model[0]) is nn.Linear
    model = nn.Sequential(tripled(lr.LowRankLinear(8, 6, rank=3)))
    with pytest.raises(lr.LowRankError, match="never reads a whole weight"):
        lr.add_lora_(model, rank=2)


def test_a_file_with_dropout_is_loaded_onto_a_patched_layer_as_onto_one_that_is_read_whole(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6))
    patched, x = copy.deepcopy(plain), torch.randn(3, 8)
    tripled(patched[0])
    model = lr.add_lora_(plain, rank=2, dropout=0.5)
    scramble(model)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(lr.load_lora(patched, tmp_path).train()(x), 3 * model.eval()(x), **ROUND)


def test_rows_are_refused_where_the_forward_is_replaced():
    model = lr.add_lora_(nn.Sequential(tripled(nn.Linear(8, 6))), rank=2, name="a")
    with lr.lora_rows(model, ["a", None]), pytest.raises(lr.LowRankError, match="read as a whole"):
        model(torch.randn(2, 8))


class Standardised(nn.Conv2d):
    """Its convolution reads the weight in its own way, its forward is torch's."""

    def _conv_forward(self, input, weight, bias):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("on_the_instance", [False, True])
def test_a_convolution_that_standardises_its_weight_sees_the_adapters(on_the_instance):
    def build():
        conv = (nn.Conv2d if on_the_instance else Standardised)(3, 4, 3)
        if on_the_instance:
            conv._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w / w.std(), b)
        return conv

    model, x = nn.Sequential(build()), torch.randn(2, 3, 5, 5)
    lr.add_lora_(model, everything, rank=2)
    scramble(model)
    plain = build()
    plain.load_state_dict(lr.remove_lora_(copy.deepcopy(model))[0].state_dict())
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    assert torch.allclose(model(x), plain(x), **ROUND)


# ---------------------------------------------------------------------------------------------------------- accelerate


def hook(module):
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    return hooks.add_hook_to_module(module, Doubled())


def unhook(module):
    return pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)


@layers
@pytest.mark.parametrize("when", ["first", "later", "removed first", "removed later", "removed last"])
def test_hooks_of_accelerate_run_around_the_adapted_layer(kind, when):
    build, x = LAYERS[kind]
    plain = build()
    model = nn.Sequential(copy.deepcopy(plain))
    dropout = 0.5 if kind in ("linear", "conv") else 0.0
    if when != "later":
        hook(model[0])
    if when == "removed first":
        unhook(model[0])
    lr.add_lora_(model, everything, rank=2, dropout=dropout, name="a")
    scramble(model)
    if when == "later":
        hook(model[0])
    if when == "removed later":
        unhook(model[0])
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    times = 1 if when.startswith("removed") and when != "removed last" else 2
    assert torch.allclose(model.eval()(x), times * plain(x), **ROUND)
    if dropout:
        assert not torch.equal(model.train()(x), model(x))
        with lr.lora_rows(model.eval(), ["a"] * 4):
            assert torch.allclose(model(x), times * plain(x), **ROUND)
    lr.merge_lora_(model, unload=True)
    assert type(model[0]) is type(plain)
    assert torch.allclose(model(x), times * plain(x), **ROUND)
    if when == "removed last":
        assert torch.allclose(unhook(model[0])(x), plain(x), **ROUND)


def test_copies_of_a_hooked_layer_compute_the_same():
    model, x = nn.Sequential(hook(nn.Linear(8, 6))), torch.randn(3, 8)
    lr.add_lora_(model, rank=2)
    scramble(model)
    clone = copy.deepcopy(model)
    out = model(x)
    assert torch.equal(clone(x), out)
    scramble(clone)
    assert torch.equal(model(x), out)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.randn(3, 8)
    base = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(lr.LowRankError, match="meta device"):
        lr.add_lora_(model, rank=2)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert torch.allclose(model(x), base, **ROUND)


@models
def test_a_model_without_values_is_refused(name):
    with torch.device("meta"):
        model = MODELS[name][0]()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(lr.LowRankError, match="meta device"):
        lr.add_lora_(model, everything, rank=1)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(make(name)[0].state_dict())
