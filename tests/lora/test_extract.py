"""What a fine-tune changed, extracted as adapters of the base."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .models import Tied, effective_weights, every_layout


def changed(model):
    """The same model after a change of every matrix."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return tuned


def test_at_full_rank_the_extraction_is_the_whole_change():
    model = every_layout()
    tuned = changed(model)
    found = lr.extract_lora(model, tuned, rank=1000)
    assert len(found) == 6
    assert all(each.energy == pytest.approx(1) for each in found.values())
    for key, weight in effective_weights(found.apply_(model)).items():
        assert torch.allclose(weight, tuned.get_parameter(key), atol=1e-5)


def test_its_error_is_the_tail_of_the_singular_values():
    model = nn.Sequential(nn.Linear(8, 6, dtype=torch.float64))
    tuned = changed(model)
    values = torch.linalg.svdvals((tuned[0].weight - model[0].weight).detach())
    for rank in range(1, 7):
        found = lr.extract_lora(model, tuned, rank=rank)
        assert found["0", "weight"].energy == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))
        left = tuned[0].weight - getattr(found.apply_(copy.deepcopy(model))[0], "weight")  # noqa: B009 - a property
        assert float(left.detach().norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-12)


def test_the_energy_asked_for_is_kept_with_the_smallest_rank():
    model = every_layout()
    tuned = changed(model)
    kept = lr.extract_lora(model, tuned, energy=0.8)
    assert all(each.energy >= 0.8 for each in kept.values())
    one_less = {place: each.b.shape[1] - 1 for place, each in kept.items() if each.b.shape[1] > 1}
    for place, rank in one_less.items():
        assert lr.extract_lora(model, tuned, rank=rank)[place].energy < 0.8
    assert "energy kept" in str(kept)
    assert "linear.weight" in str(kept)


def test_the_table_tells_the_rank_of_every_layout():
    model = every_layout()
    model.experts = nn.Module()
    model.experts.up = nn.Parameter(torch.randn(3, 6, 5))
    rows = str(lr.extract_lora(model, changed(model), rank=2)).splitlines()[1:]
    assert len(rows) == 7
    assert {row.split()[1] for row in rows} == {"2"}


def test_models_that_differ_are_refused():
    model = every_layout()
    with pytest.raises(lr.LowRankError, match="same weights"):
        lr.extract_lora(model, copy.deepcopy(model), rank=2)
    with pytest.raises(lr.LowRankError, match="in both models"):
        lr.extract_lora(model, nn.ModuleDict({"linear": nn.Linear(4, 4)}), rank=2)
    with pytest.raises(lr.LowRankError, match="got rank=None and energy=None"):
        lr.extract_lora(model, changed(model))


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
    monkeypatch.setattr("lowrank_layers.lora.extract.svd", lambda *args: decomposed.append(1) or lr.svd(*args))
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


def test_of_a_large_matrix_only_the_leading_directions_are_computed(monkeypatch):
    asked = []
    exact = torch.linalg.svd

    def watched(matrix, *args, **kwargs):
        asked.append(min(matrix.shape))
        return exact(matrix, *args, **kwargs)

    base = nn.Sequential(nn.Linear(560, 600))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.randn(600, 3) @ torch.randn(3, 560) + 0.01 * torch.randn(600, 560)
    change = (tuned[0].weight - base[0].weight).detach().double()
    values = torch.linalg.svdvals(change)
    monkeypatch.setattr(torch.linalg, "svd", watched)
    (found,) = lr.extract_lora(base, tuned, rank=5).values()
    assert max(asked) < 100
    tail = values[5:].norm()
    assert (change - (found.b @ found.a).double()).norm() <= 1.001 * tail
    assert found.energy == pytest.approx(1 - float(tail**2 / values.norm() ** 2), rel=1e-6)
