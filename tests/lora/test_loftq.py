"""Adapters that restore what quantizing took."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (8, 24)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3), (2, 6, 6, 6)),
    "grouped": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, stride=2), (2, 8, 4, 4)),
    "grouped and transposed": (lambda: nn.ConvTranspose1d(12, 8, 3, groups=2), (2, 12, 7)),
    "embedding": (lambda: nn.Embedding(14, 10), None),
}
settings = pytest.mark.parametrize("scale", [{}, {"alpha": 12}, {"alpha": 5, "rslora": True}], ids=str)


def everything(name, module):
    return True


def coarse(weight):
    """To three bits by the largest entry, which the second step changes."""
    step = weight.abs().amax() / 3.5
    return (weight / step).round().clamp(-4, 3) * step


@torch.no_grad()
def coarsen(model):
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(coarse(parameter))
    return model


def tail(kind, matrix, rank):
    """What the best approximation of that rank leaves, all groups together."""
    values = torch.linalg.svdvals(kind.matrix(matrix).double())
    return float(values[..., rank:].square().sum().sqrt())


@pytest.mark.parametrize("name", LAYERS)
@settings
def test_the_error_is_that_of_the_best_approximation_of_the_residual(name, scale):
    build, shape = LAYERS[name]
    full = nn.Sequential(build())
    x = torch.randint(14, (2, 5)) if shape is None else torch.randn(shape)
    model = coarsen(copy.deepcopy(full))
    base, quantized = model[0].weight.detach().clone(), model(x)
    lr.add_lora_(model, everything, rank=3, init=lr.LoftQ(full), **scale)
    assert torch.equal(model[0]._parameters["weight"], base)
    left = float((full[0].weight - model[0].weight).detach().double().norm())
    assert left == pytest.approx(tail(model[0].lora_weight.layout, (full[0].weight - base).detach(), 3), rel=1e-4)
    assert left < 0.95 * float((full[0].weight.detach() - base).norm())
    assert (model(x) - full(x)).norm() < (quantized - full(x)).norm()
    with lr.lora_disabled(model):
        assert torch.equal(model(x), quantized)
    model(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in lr.lora_parameters(model))
    with pytest.raises(lr.LowRankError, match="positive scaling"):
        lr.add_lora_(model, everything, rank=3, alpha=0, init=lr.LoftQ(full), name="b")


def test_a_state_dict_is_a_reference_and_its_dtype_need_not_be_the_bases():
    full = nn.Sequential(nn.Linear(24, 20))
    model = coarsen(copy.deepcopy(full)).bfloat16()
    lr.add_lora_(model, rank=20, init=lr.LoftQ(full.state_dict()))
    adapter = model[0].lora_weight.adapters["default"]
    assert adapter.A.dtype == torch.float32
    error = (adapter.delta(model[0].lora_weight.layout) + model[0]._parameters["weight"]).float() - full[0].weight
    assert float(error.detach().norm() / full[0].weight.detach().norm()) < 0.01
    assert model(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_parts_of_a_fused_attention_have_their_part_as_reference():
    full = nn.ModuleDict({"a": nn.MultiheadAttention(12, 2)})
    model = coarsen(copy.deepcopy(full))
    for reference in (full, full.state_dict()):
        lr.add_lora_(model, ["a.k_proj"], rank=12, init=lr.LoftQ(reference))
        assert torch.allclose(model["a"].k_proj, full["a"].in_proj_weight.chunk(3)[1], atol=1e-5)
        lr.remove_lora_(model)


def test_the_lengths_of_dora_are_those_of_the_restored_weight():
    full = nn.Sequential(nn.Linear(24, 20))
    model, x = coarsen(copy.deepcopy(full)), torch.randn(8, 24)
    lr.add_lora_(model, rank=20, init=lr.LoftQ(full), dora=True)
    assert torch.allclose(model(x), full(x), atol=1e-5)


def test_what_compressing_took_comes_back_too():
    full = nn.Sequential(nn.Linear(24, 20))
    model = nn.Sequential(lr.LowRankLinear.from_dense(full[0], rank=4))
    lr.add_lora_(model, rank=5, init=lr.LoftQ(full))
    assert torch.allclose(model[0].weight, lr.svd(full[0].weight, 9).to_dense(), atol=1e-5)


@pytest.mark.parametrize("rank", [2, 6])
def test_where_nothing_was_taken_adapters_still_learn(rank):
    full = nn.Sequential(nn.Linear(24, 20))
    model, x = copy.deepcopy(full), torch.randn(8, 24)
    with torch.no_grad():
        model[0].weight[3] += 1  # a residual of rank one
    lr.add_lora_(model, rank=rank, init=lr.LoftQ(full))
    assert torch.allclose(model(x), full(x), atol=1e-5)
    same = lr.add_lora_(copy.deepcopy(full), rank=rank, init=lr.LoftQ(full))
    assert torch.allclose(same(x), full(x), atol=1e-6)
    same(x).square().sum().backward()
    assert bool(same[0].lora_weight.adapters["default"].B.grad.any())


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        (None, "LoftQ: got a reference of type NoneType, expected the model before"),
        ({}, r"LoftQ got nothing for '0\.weight'.*give the model, or state dict"),
        (nn.Sequential(), r"LoftQ got nothing for '0\.weight'"),
        (nn.Sequential(nn.Linear(5, 20)), r"a tensor of shape \(20, 5\) for '0\.weight'"),
        ({"0.weight": torch.full((20, 24), torch.nan)}, "NaN"),
    ],
)
def test_references_that_do_not_fit(reference, match):
    model = nn.Sequential(nn.Linear(24, 20))
    with pytest.raises(lr.LowRankError, match=match):
        lr.add_lora_(model, rank=2, init=lr.LoftQ(reference))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_alternating_is_never_worse_than_one_step(name):
    gains = []
    for _ in range(3):
        full = nn.Sequential(LAYERS[name][0]())
        weight = full[0].weight.detach()
        errors = {}
        for steps in (1, 2, 5, 10):
            model = lr.loftq_(copy.deepcopy(full), 3, coarse, steps=steps, target=everything, alpha=9)
            base = model[0]._parameters["weight"].detach()
            errors[steps] = float((model[0].weight.detach() - weight).norm())
            assert len(base.unique()) <= 8  # is quantized
            assert errors[steps] == pytest.approx(tail(model[0].lora_weight.layout, weight - base, 3), rel=1e-4)
            if steps == 1:
                assert torch.equal(base, coarse(weight))
        assert errors[1] < float((coarse(weight) - weight).norm())
        assert errors[1] >= errors[2] >= errors[5] >= errors[10]
        gains.append(errors[10] / errors[1])
    assert min(gains) < 0.99


def test_loftq_is_all_or_nothing():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    state = copy.deepcopy(model.state_dict())

    def second_fails(weight):
        return coarse(weight) if weight.shape == (10, 12) else weight * torch.nan

    for problem, match in (
        ({"quantize": second_fails}, "'1.weight', expected finite values"),
        ({"quantize": lambda w: w[:1]}, r"returned NaN, Inf or shape \(1, 12\)"),
        ({"quantize": lambda w: None}, "returned NoneType"),
        ({"alpha": -1.0}, "positive scaling"),
        ({"rank": 0}, "rank 0"),
        ({"steps": 0}, "steps=0"),
        ({"name": "a.b"}, "without dots"),
    ):
        with pytest.raises(lr.LowRankError, match=match):
            lr.loftq_(model, **{"rank": 2, "quantize": coarse, **problem})
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


def test_loftq_refuses_tied_and_factored_weights():
    model = nn.ModuleDict({"table": nn.Embedding(9, 6), "head": nn.Linear(6, 9)})
    model["head"].weight = model["table"].weight
    with pytest.raises(lr.LowRankError, match=r"tied to 'table\.weight'"):
        lr.loftq_(model, 2, coarse)
    with pytest.raises(lr.LowRankError, match="LowRankLinear, whose weight is a product"):
        lr.loftq_(nn.Sequential(lr.LowRankLinear(8, 8, rank=2)), 2, coarse)


class TestTorchao:
    """Weights that are tensors of torchao's own kind."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def models(self, request):
        library = pytest.importorskip("torchao.quantization")
        full = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)).to(request.param)
        model = copy.deepcopy(full)
        library.quantize_(model, library.Int8WeightOnlyConfig())
        assert type(model[0].weight) is not nn.Parameter
        return full, model, torch.randn(5, 32, dtype=request.param)

    def close(self, x):
        return {"atol": 1e-5} if x.dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}

    def test_adapters_restore_the_weight(self, models):
        full, model, x = models
        before = model(x)
        lr.add_lora_(model, rank=4, init=lr.LoftQ(full))
        for index in (0, 2):
            adapter = model[index].lora_weight.adapters["default"]
            assert adapter.A.dtype == torch.float32
            assert type(adapter.A) is nn.Parameter
            base = model[index]._parameters["weight"].dequantize()
            taken = (full[index].weight - base).detach().float()
            kind = model[index].lora_weight.layout
            left = float((taken - adapter.delta(kind, torch.float32)).detach().norm())
            assert left == pytest.approx(tail(kind, taken, 4), rel=1e-2)
            assert left < 0.9 * float(taken.norm())
        if x.dtype == torch.float32:
            assert (model(x) - full(x)).norm() < (before - full(x)).norm()

    @pytest.mark.parametrize("init", ["kaiming", "pissa"])
    @pytest.mark.parametrize("dora", [False, True])
    def test_it_computes_what_the_dequantized_model_computes(self, models, init, dora):
        full, model, x = models
        base, keys = model(x), list(model.state_dict())
        twin = copy.deepcopy(full)
        with torch.no_grad():
            for index in (0, 2):
                twin[index].weight.copy_(model[index].weight.dequantize())
        for each in (model, twin):
            lr.add_lora_(each, rank=3, init=init, dora=dora, seed=0)
            assert torch.allclose(each(x), base, **self.close(x))
        with torch.no_grad():
            for ours, theirs in zip(lr.lora_parameters(model), lr.lora_parameters(twin), strict=True):
                theirs.copy_(ours.add_(torch.randn_like(ours) / 4))
        for each in (model, twin):
            each(x).square().sum().backward()
        assert not torch.allclose(model(x), base, atol=0.1)
        assert torch.allclose(model(x), twin(x), **self.close(x))
        for ours, theirs in zip(lr.lora_parameters(model), lr.lora_parameters(twin), strict=True):
            assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < (1e-4 if x.itemsize == 4 else 0.05)
        with lr.lora_disabled(model):  # DoRA's weight is formed, and so not multiplied by torchao's kernel
            assert torch.allclose(model(x), base, **self.close(x)) if dora else torch.equal(model(x), base)
        clone = copy.deepcopy(model)
        assert torch.equal(clone(x), model(x))
        clone.load_state_dict(model.state_dict())
        assert torch.equal(clone(x), model(x))
        lr.remove_lora_(model)
        assert list(model.state_dict()) == keys
        assert type(model[0]) is nn.Linear
        assert torch.equal(model(x), base)

    def test_merging_is_refused_and_changes_nothing(self, models):
        _, model, x = models
        lr.add_lora_(model, rank=2, init="pissa")
        out = model(x)
        with pytest.raises(lr.LowRankError, match=r"'0.weight' is quantized \(Int8Tensor\).*full-precision"):
            lr.merge_lora_(model)
        assert torch.equal(model(x), out)

    def test_adapters_of_it_are_saved_and_loaded(self, models, tmp_path):
        full, model, x = models
        fresh = copy.deepcopy(model)
        lr.add_lora_(model, rank=2, init=lr.LoftQ(full))
        lr.save_lora(model, tmp_path)
        assert torch.equal(lr.load_lora(fresh, tmp_path)(x), model(x))

    def test_other_layers_and_other_weights_of_it(self, models):
        library = pytest.importorskip("torchao.quantization")
        table = nn.Sequential(nn.Embedding(9, 32))
        library.quantize_(table, library.Int8WeightOnlyConfig(), filter_fn=lambda m, _: isinstance(m, nn.Embedding))
        with pytest.raises(lr.UnsupportedLayerError, match=r"quantized \(Int8Tensor\) and a Embedding"):
            lr.add_lora_(table, everything, rank=2)
        _, model, x = models
        mixed = nn.Sequential(nn.Linear(32, 32, dtype=x.dtype), model)
        found = lr.weight_gradients(mixed, [(x, None)], lambda output, _: output.square().mean())
        assert set(found) == {"0.weight"}
        with pytest.raises(lr.LowRankError, match="before quantizing"):
            lr.factorize_(model, "svd")
