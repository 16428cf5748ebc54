"""Extracting, and combining several adapters into one."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter, Bank
from lowrank_layers.lora.combine import How
from lowrank_layers.lora.task_vectors import Seed, combined

from .peer import peft, second, wrapped


def everything(name, module):
    return True


def base():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "table": nn.Embedding(9, 5),
            "recurrent": nn.LSTM(5, 4),
        }
    )


def changed(model):
    """The same model after a change of every matrix."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return tuned


def two(model, rank=2, **settings):
    """Two adapters on every weight, neither of them zero."""
    for name in "ab":
        lr.add_lora_(model, everything, rank=rank, alpha=3, name=name, **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                module.B.normal_()
    return model


def weights(model):
    return {
        f"{owner}.{key}": getattr(module, key).detach().clone()
        for owner, module in model.named_modules()
        for key in getattr(module, "_adapted_names", ())
    }


def test_at_full_rank_the_extraction_is_the_whole_change():
    model = base()
    tuned = changed(model)
    found = lr.extract_lora(model, tuned, rank=1000)
    assert len(found) == 6
    assert all(each.energy == pytest.approx(1) for each in found.values())
    for key, weight in weights(found.apply_(model)).items():
        assert torch.allclose(weight, tuned.get_parameter(key), atol=1e-5)


def test_its_error_is_the_tail_of_the_singular_values():
    model = nn.Sequential(nn.Linear(8, 6, dtype=torch.float64))
    tuned = changed(model)
    values = torch.linalg.svdvals((tuned[0].weight - model[0].weight).detach())
    for rank in range(1, 7):
        found = lr.extract_lora(model, tuned, rank=rank)
        assert found["0", "weight"].energy == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))
        left = tuned[0].weight - getattr(found.apply_(copy.deepcopy(model))[0], "weight")  # noqa: B009 - a property
        assert float(left.norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-12)


def test_the_energy_asked_for_is_kept_with_the_smallest_rank():
    model = base()
    tuned = changed(model)
    kept = lr.extract_lora(model, tuned, energy=0.8)
    assert all(each.energy >= 0.8 for each in kept.values())
    one_less = {place: each.b.shape[1] - 1 for place, each in kept.items() if each.b.shape[1] > 1}
    for place, rank in one_less.items():
        assert lr.extract_lora(model, tuned, rank=rank)[place].energy < 0.8
    assert "energy kept" in str(kept)
    assert "linear.weight" in str(kept)


def test_the_table_tells_the_rank_of_every_layout():
    model = base()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.randn(3, 6, 5))
    rows = str(lr.extract_lora(model, changed(model), rank=2)).splitlines()[1:]
    assert len(rows) == 7
    assert {row.split()[1] for row in rows} == {"2"}


def test_models_that_differ_are_refused():
    model = base()
    with pytest.raises(lr.LowRankError, match="same weights"):
        lr.extract_lora(model, copy.deepcopy(model), rank=2)
    with pytest.raises(lr.LowRankError, match="in both models"):
        lr.extract_lora(model, nn.ModuleDict({"linear": nn.Linear(4, 4)}), rank=2)
    with pytest.raises(lr.LowRankError, match="either rank= or energy="):
        lr.extract_lora(model, changed(model))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices):
        return self.head(torch.tanh(self.mid(self.embed(indices))))


def untied(model):
    """The same values, each layer with a weight of its own."""
    model = copy.deepcopy(model)
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    return model


TIES = {
    "both": (lambda model: model, lambda model: model),
    "the base": (lambda model: model, untied),
    "the tuned model": (untied, lambda model: model),
}


@pytest.mark.parametrize("target", [None, lambda *_: True, ["mid", "embed", "head"]], ids=["all", "any", "names"])
@pytest.mark.parametrize("side", TIES)
def test_tied_weights_are_extracted_from_either_side(side, target, monkeypatch):
    first, second = TIES[side]
    tied, x = Tied(), torch.arange(7)
    base, tuned = first(tied), second(changed(tied))
    if side == "the base":
        tuned.head.weight.data.add_(torch.randn(7, 5))
    decomposed = []
    monkeypatch.setattr("lowrank_layers.lora.extract.svd", lambda matrix: decomposed.append(1) or lr.svd(matrix))
    found = lr.extract_lora(base, tuned, rank=5, target=target)
    assert set(found) == {("embed", "weight"), ("mid", "weight"), ("head", "weight")}
    assert len(decomposed) == (2 if side == "both" else 3)
    tuned.mid.bias = base.mid.bias
    assert torch.allclose(found.apply_(base)(x), tuned(x), atol=1e-5)


def test_of_tied_weights_that_did_not_change_nothing_is_extracted():
    base = Tied()
    tuned = copy.deepcopy(base)
    tuned.mid.weight.data.add_(torch.randn(5, 5))
    for other in (tuned, untied(tuned)):
        assert set(lr.extract_lora(base, other, rank=2)) == {("mid", "weight")}
        assert set(lr.extract_lora(untied(base), other, rank=2)) == {("mid", "weight")}


def test_parts_of_a_fused_weight_are_extracted_alone():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    tuned = changed(base)
    found = lr.extract_lora(base, tuned, rank=8, target=["attention.q_proj"])
    assert list(found) == [("attention", "q_proj")]
    weight = found.apply_(base)["attention"].in_proj_weight
    assert torch.allclose(weight[:8], tuned["attention"].in_proj_weight[:8], atol=1e-5)


def test_an_extraction_that_does_not_fit_is_refused_and_changes_nothing():
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    found = lr.extract_lora(base, changed(base), rank=2)
    cases = [
        (nn.Sequential(nn.Linear(8, 6)), "extracted", "no '1.weight'"),
        (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), "extracted", "shape"),
        (found.apply_(copy.deepcopy(base)), "extracted", "already"),
        (copy.deepcopy(base), "a.b", "without dots"),
    ]
    for model, name, words in cases:
        before = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
        with pytest.raises(lr.LowRankError, match=words):
            found.apply_(model, name)
        assert (list(model.state_dict()), [p.requires_grad for p in model.parameters()]) == before
    one, two = found.apply_(copy.deepcopy(base)), found.apply_(copy.deepcopy(base))
    one[0].lora_weight.adapters["extracted"].A.data.zero_()
    assert two[0].lora_weight.adapters["extracted"].A.any()


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
@pytest.mark.parametrize(("how", "settings"), [("concatenation", {}), ("svd", {"rank": 4})])
def test_a_sum_is_exact(how, settings, init):
    model = two(base(), init=init)
    lr.use_adapter(model, ["a", "b"])
    expected = weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how=how, **settings)
    for key, weight in weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-4), key


def test_frozen_starts_are_part_of_the_sum():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    two(model, init="pissa")
    lr.use_adapter(model, ["a", "b"])
    expected = weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how="concatenation")
    for key, weight in weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-5), key


def test_the_svd_of_the_sum_is_the_best_of_its_rank():
    model = two(nn.Sequential(nn.Linear(8, 6, dtype=torch.float64)))
    plain = model[0]._parameters["weight"].detach()
    lr.use_adapter(model, ["a", "b"])
    delta = weights(model)["0.weight"] - plain
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "best", how="svd", rank=2)
    left = delta - (weights(model)["0.weight"] - plain)
    assert float(left.norm()) == pytest.approx(float(torch.linalg.svdvals(delta)[2:].norm()), rel=1e-10)


def test_weights_scale_and_subtract():
    model = two(nn.Sequential(nn.Linear(8, 6)))
    plain = model[0]._parameters["weight"].detach()
    parts = [weights(lr.use_adapter(model, name))["0.weight"] - plain for name in "ab"]
    lr.combine_lora_(model, {"a": 0.5, "b": -2.0}, "sum", how="concatenation")
    assert torch.allclose(weights(model)["0.weight"], plain + 0.5 * parts[0] - 2 * parts[1], atol=1e-5)


@pytest.mark.parametrize("how", ["ties", "dare", "linear"])
def test_of_one_adapter_at_full_density_nothing_changes(how):
    model = two(base())
    lr.use_adapter(model, "a")
    expected = weights(model)
    lr.combine_lora_(model, {"a": 1.0}, "same", how=how, density=1.0)
    for key, weight in weights(model).items():
        assert torch.allclose(weight, expected[key], atol=1e-4), key


def test_ties_elects_the_sign_that_outweighs_and_dare_keeps_the_mean():
    first, second = torch.tensor([3.0, -1.0, 2.0, 0.1]), torch.tensor([1.0, 2.0, -5.0, 0.2])
    # the last entry is pruned from both, of the second and third those of the smaller magnitude are outvoted
    found = combined([first, second], [1.0, 0.5], "ties", 0.75, Seed(0))
    assert torch.equal(found, torch.tensor([(3 + 0.5) / 2, 1.0, -2.5, 0.0]))
    many = combined([torch.ones(100_000)], [1.0], "dare_linear", 0.2, Seed(0))
    assert float(many.mean()) == pytest.approx(1, abs=0.03)
    assert set(many.unique().tolist()) == {0.0, 5.0}


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
        got = adapters["sum"].delta(model.lora_experts.kind)[k]
        assert torch.allclose(got, layer.lora_weight.adapters["sum"].delta(layer.lora_weight.kind), atol=1e-5)


@pytest.mark.parametrize("how", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_pruned_deltas_are_summed_in_every_layout(how):
    """Of two that are the same, at full density: twice the delta, or for TIES their mean."""
    model = two(base())
    for module in model.modules():
        if isinstance(module, Bank):
            module.adapters["b"].load_state_dict(module.adapters["a"].state_dict())
    lr.use_adapter(model, "a" if "ties" in how else ["a", "b"])
    expected = weights(model)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "sum", how=how, density=1.0)
    for key, weight in weights(model).items():
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


@pytest.mark.parametrize("how", get_args(How))
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
    delta = model[0].lora_weight.adapters["a"].delta(model[0].lora_weight.kind)
    for how in get_args(How):
        lr.combine_lora_(model, {"a": -0.5}, how, how=how)
        got = model[0].lora_weight.adapters[how].delta(model[0].lora_weight.kind)
        assert torch.allclose(got, -0.5 * delta, atol=1e-5), how
    lr.combine_lora_(model, {"a": 1.0}, "small", rank=1)
    assert model[0].lora_weight.adapters["small"].A.shape == (1, 8)


class Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(9, 7), nn.Linear(8, 6), nn.Conv2d(3, 5, 3)
        self.only = nn.Linear(5, 4)


WEIGHTS = {"positive": [0.5, 1.5, 1.0], "mixed": [0.5, -1.5, 0.7], "negative": [-0.5, -0.8, -1.2]}


@pytest.mark.parametrize("sizes", WEIGHTS)
@pytest.mark.parametrize("how", [how for how in get_args(How) if how not in ("concatenation", "dare")])
def test_every_combination_is_what_peft_computes(how, sizes, tmp_path, monkeypatch):
    library, targets = peft(), ["table", "linear", "conv", "only"]
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
        got = bank.adapters["new"].delta(bank.kind).detach()
        assert float((got - expected).norm()) <= 1e-4 * float(expected.norm()), name
        if not unequal:
            layer = getattr(theirs.base_model.model, name)
            a = layer.lora_embedding_A["new"] if name == "table" else layer.lora_A["new"].weight
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
    ]:
        weights_, name, *how = arguments
        with pytest.raises(lr.LowRankError, match=word):
            lr.combine_lora_(model, weights_, name, **({"how": how[0]} if how else {}))
    assert list(model.state_dict()) == before
