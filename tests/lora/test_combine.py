"""Combining several adapters into one: exact sums, best approximations, TIES, DARE and pruning as in PEFT."""

from typing import get_args

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter, Bank
from lowrank_layers.lora.combine import Combination

from .models import Tied, effective_weights, every_layout, everything
from .peer import peft, second, wrapped


def two(model, rank=2, **settings):
    """Two adapters on every weight, neither of them zero."""
    for name in "ab":
        lr.add_lora_(model, everything, rank=rank, alpha=3, name=name, **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                module.B.normal_()
    return model


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
@pytest.mark.parametrize(("how", "settings"), [("concatenation", {}), ("svd", {"rank": 4})])
def test_a_sum_is_exact(how, settings, init):
    model = two(every_layout(), init=init)
    lr.use_adapter(model, ["a", "b"])
    expected = effective_weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how=how, **settings)
    for key, weight in effective_weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-4), key


def test_frozen_starts_are_part_of_the_sum():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    two(model, init="pissa")
    lr.use_adapter(model, ["a", "b"])
    expected = effective_weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how="concatenation")
    for key, weight in effective_weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-5), key


def test_the_svd_of_the_sum_is_the_best_of_its_rank():
    model = two(nn.Sequential(nn.Linear(8, 6, dtype=torch.float64)))
    plain = model[0]._parameters["weight"].detach()
    lr.use_adapter(model, ["a", "b"])
    delta = effective_weights(model)["0.weight"] - plain
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "best", how="svd", rank=2)
    left = delta - (effective_weights(model)["0.weight"] - plain)
    assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(delta)[2:].norm()), rel=1e-10)


def test_weights_scale_and_subtract():
    model = two(nn.Sequential(nn.Linear(8, 6)))
    plain = model[0]._parameters["weight"].detach()
    parts = [effective_weights(lr.use_adapter(model, name))["0.weight"] - plain for name in "ab"]
    lr.combine_lora_(model, {"a": 0.5, "b": -2.0}, "sum", how="concatenation")
    assert torch.allclose(effective_weights(model)["0.weight"], plain + 0.5 * parts[0] - 2 * parts[1], atol=1e-5)


@pytest.mark.parametrize("how", ["ties", "dare", "linear"])
def test_of_one_adapter_at_full_density_nothing_changes(how):
    model = two(every_layout())
    lr.use_adapter(model, "a")
    expected = effective_weights(model)
    lr.combine_lora_(model, {"a": 1.0}, "same", how=how, density=1.0)
    for key, weight in effective_weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-4), key


def rows(*values):
    """A layer of one output, and adapters whose deltas are these rows."""
    model = nn.Sequential(nn.Linear(len(values[0]), 1))
    for name, value in zip("ab", values, strict=False):
        lr.add_lora_(model, rank=1, name=name)
        adapter = model[0].lora_weight.adapters[name]
        adapter.A.data.copy_(value), adapter.B.data.fill_(1)
    return model


def delta_of(model, name):
    return model[0].lora_weight.adapters[name].delta(model[0].lora_weight.layout).detach()[0]


def test_ties_elects_the_sign_that_outweighs():
    """Both lose their last entry, the smallest; of the second and third the smaller is outvoted."""
    model = rows(torch.tensor([3.0, -1.0, 2.0, 0.1]), torch.tensor([1.0, 2.0, -5.0, 0.2]))
    lr.combine_lora_(model, {"a": 1.0, "b": 0.5}, "sum", how="ties_svd", density=0.75)
    assert torch.allclose(delta_of(model, "sum"), torch.tensor([(3 + 0.5) / 2, 1.0, -2.5, 0.0]), atol=1e-6)


def test_dare_keeps_the_mean():
    model = rows(torch.ones(100_000), torch.zeros(100_000))
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how="dare_linear_svd", density=0.2)
    found = delta_of(model, "sum")
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert torch.all((found.abs() < 1e-3) | ((found - 5).abs() < 1e-3))


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "ties", "magnitude_prune_svd"])
def test_stacks_of_matrices_are_combined_one_by_one(how):
    """As every matrix of the stack alone, in a layer of its own."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 6, 5))
    two(model)
    adapters = model.lora_experts.adapters
    alone = nn.ModuleList([nn.Linear(5, 6) for _ in range(3)])
    two(alone)
    with torch.no_grad():
        for k, layer in enumerate(alone):
            for own, adapter in layer.lora_weight.adapters.items():
                adapter.A.copy_(adapters[own].A[k])
                adapter.B.copy_(adapters[own].B[k])
    for each in (model, alone):
        lr.combine_lora_(each, {"a": 0.5, "b": -2.0}, "sum", how=how, density=1.0)
    for k, layer in enumerate(alone):
        got = adapters["sum"].delta(model.lora_experts.layout)[k]
        assert torch.allclose(got, layer.lora_weight.adapters["sum"].delta(layer.lora_weight.layout), atol=1e-5)


@pytest.mark.parametrize("how", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_pruned_deltas_are_summed_in_every_layout(how):
    """Of two that are the same, at full density: twice the delta, or for TIES their mean."""
    model = two(every_layout())
    for module in model.modules():
        if isinstance(module, Bank):
            module.adapters["b"].load_state_dict(module.adapters["a"].state_dict())
    lr.use_adapter(model, "a" if "ties" in how else ["a", "b"])
    expected = effective_weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how=how, density=1.0)
    for key, weight in effective_weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-4), key


def test_biases_of_adapters_are_summed_with_their_weights():
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    plain = model(x)
    two(model, bias=True)
    with torch.no_grad():
        for adapter in model[0].lora_weight:
            adapter.bias.normal_()
    parts = [lr.use_adapter(model, name)(x) - plain for name in "ab"]
    lr.combine_lora_(model, {"a": 0.5, "b": -2.0}, "sum", how="cat")
    assert torch.allclose(model(x) - plain, 0.5 * parts[0] - 2 * parts[1], atol=1e-4)


def test_a_module_that_one_adapter_trains_whole_is_copied_and_of_two_refused():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), torch.randn(3, 8)
    lr.add_lora_(model, ["0"], rank=2, name="a", modules_to_save=["1"])
    lr.add_lora_(model, ["0"], rank=2, name="b")
    model[1].lora_whole["a"].weight.data.normal_()
    expected = lr.use_adapter(model, "a")(x)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum")
    assert torch.allclose(model(x), expected, atol=1e-6)
    model[1].lora_whole["sum"].weight.data.zero_()
    assert torch.allclose(lr.use_adapter(model, "a")(x), expected, atol=1e-6)
    keys = list(model.state_dict())
    with pytest.raises(lr.LowRankError, match="'1' is trained whole by each"):
        lr.combine_lora_(model, {"a": 1.0, "sum": 1.0}, "more")
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("how", get_args(Combination))
def test_rows_of_tokens_are_summed_with_their_weights(how):
    model, x = Tied(), torch.arange(7)
    lr.add_lora_(model, ["mid"], rank=2, name="a", trainable_tokens=[5, 1])
    lr.add_lora_(model, ["mid"], rank=2, name="b", trainable_tokens=[0, 5])
    adapters = model.embed.lora_weight.adapters
    with torch.no_grad():
        for name in "ab":
            adapters[name].rows.normal_()
    expected = model.embed._parameters["weight"].detach().clone()
    for name, weight, tokens in (("a", 0.5, [5, 1]), ("b", -2.0, [0, 5])):
        expected[tokens] += weight * adapters[name].rows.detach()
    lr.combine_lora_(model, {"a": 0.5, "b": -2.0}, "sum", how=how)
    assert torch.allclose(model.embed(x), expected, atol=1e-6)
    assert torch.allclose(model.head(torch.eye(5)).mT, expected, atol=1e-6)
    assert model.head.lora_weight.adapters["sum"].rows is adapters["sum"].rows


def test_one_adapter_is_only_scaled():
    model = two(nn.Sequential(nn.Linear(8, 6)), init="pissa")
    delta = model[0].lora_weight.adapters["a"].delta(model[0].lora_weight.layout)
    for how in get_args(Combination):
        lr.combine_lora_(model, {"a": -0.5}, how, how=how)
        got = model[0].lora_weight.adapters[how].delta(model[0].lora_weight.layout)
        assert torch.allclose(got, -0.5 * delta, atol=1e-5), how
    lr.combine_lora_(model, {"a": 1.0}, "small", rank=1)
    assert model[0].lora_weight.adapters["small"].A.shape == (1, 8)


class Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.conv = nn.Embedding(9, 7), nn.Linear(8, 6), nn.Conv2d(3, 5, 3)
        self.only = nn.Linear(5, 4)


WEIGHTS = {"positive": [0.5, 1.5, 1.0], "mixed": [0.5, -1.5, 0.7], "negative": [-0.5, -0.8, -1.2]}


@pytest.mark.parametrize("sizes", WEIGHTS)
@pytest.mark.parametrize("how", [how for how in get_args(Combination) if how not in ("concatenation", "dare")])
def test_every_combination_is_what_peft_computes(how, sizes, tmp_path, monkeypatch):
    library, targets = peft(), ["embedding", "linear", "conv", "only"]
    unequal = how in ("cat", "svd") or how.endswith("_svd")
    theirs = wrapped(Peer(), targets, r=2, lora_alpha=3)
    for k, name in enumerate(["second", "third"]):
        second(theirs, targets[: 3 - k], name, r=3 + k if unequal else 2, lora_alpha=5 - k)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    model = Peer()
    for name in ("default", "second", "third"):
        lr.load_lora(model, tmp_path / ("" if name == "default" else name), name)

    inject = library.LoraModel.inject_adapter

    def seeded(*arguments, **more):  # PEFT draws the new adapter's initial values before it drops entries
        inject(*arguments, **more)
        torch.manual_seed(5)

    monkeypatch.setattr(library.LoraModel, "inject_adapter", seeded)
    found = dict(zip(["default", "second", "third"], WEIGHTS[sizes], strict=True))
    rank = {"rank": 3} if how.endswith("svd") else {}
    theirs.add_weighted_adapter(
        list(found), list(found.values()), "new", how, density=0.6, **({"svd_rank": 3} if rank else {})
    )
    lr.combine_lora_(model, found, "new", how=how, density=0.6, seed=5, **rank)
    for name in targets:
        bank = getattr(model, name).lora_weight
        expected = getattr(theirs.base_model.model, name).get_delta_weight("new").detach()
        got = bank.adapters["new"].delta(bank.layout).detach()
        assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()), name
        if not unequal:
            layer = getattr(theirs.base_model.model, name)
            a = layer.lora_embedding_A["new"] if name == "embedding" else layer.lora_A["new"].weight
            assert bank.adapters["new"].A.shape == a.shape


def test_bad_combinations_are_refused_and_change_nothing():
    model = two(nn.Sequential(nn.Linear(8, 6)))
    lr.add_lora_(model, rank=3, name="c")
    before = list(model.state_dict())
    for arguments, word in [
        (({"z": 1.0}, "x"), "'z'"),
        (({"a": 1.0}, "b"), "already"),
        (({"a": 1.0, "c": 1.0}, "x", "linear"), "equal ranks"),
        (({"a": 1.0}, "x", "magic"), "magic"),
        (({}, "x"), "no weights"),
        (({"a": float("nan")}, "x"), "nan"),
        (({"a": 1.0}, "x.y"), "without dots"),
        (({"a": True}, "x"), "weight True"),
    ]:
        weights_, name, *how = arguments
        with pytest.raises(lr.LowRankError, match=word):
            lr.combine_lora_(model, weights_, name, **({"how": how[0]} if how else {}))
    for settings, word in [
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"density": 0}, "density=0"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": "0.5"}, "density='0.5'"),
    ]:
        with pytest.raises(lr.LowRankError, match=word):
            lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "x", **settings)
    assert list(model.state_dict()) == before
