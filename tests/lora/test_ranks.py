"""Ranks of adapters: lowered where a matrix has no more, chosen by rules, and written for PEFT."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

from .peer import peft, wrapped

NARROW = {
    "a classifier of two labels": (lambda: nn.Linear(64, 2), (3, 64), 2),
    "a regression": (lambda: nn.Linear(64, 1), (3, 64), 1),
    "a depthwise convolution": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5), 1),
    "a pointwise convolution": (lambda: nn.Conv1d(16, 3, 1), (2, 16, 5), 3),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(3, 16, 2), (2, 3, 4, 4), 3),
    "an embedding": (lambda: nn.Embedding(20, 4), None, 4),
}


def ranks_of(model):
    return {
        name.partition(".lora_")[0]: module.B.shape[1]
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
    }


@torch.no_grad()
def scramble(model):
    for module in model.modules():
        if isinstance(module, Adapter):
            module.A.normal_()
            module.B.normal_()


@pytest.mark.parametrize("kind", NARROW)
def test_a_layer_narrower_than_the_rank_gets_what_it_has_and_is_named(kind):
    build, _, most = NARROW[kind]
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "narrow": build()})
    with pytest.warns(UserWarning, match=rf"'narrow\.weight' to {most}; give rank_pattern= .* exclude="):
        lr.add_lora_(model, lambda *_: True, rank=8, alpha=16)
    assert ranks_of(model) == {"body": 8, "narrow": most}
    scalings = {name: float(m.scaling) for name, m in model.named_modules() if isinstance(m, Adapter)}
    assert list(scalings.values()) == pytest.approx([2.0, 16 / most])  # alpha over the rank that the layer has


@pytest.mark.parametrize("kind", NARROW)
def test_a_lowered_adapter_reaches_every_change_of_its_matrix(kind):
    """No rank above it would reach more: the best adapter of any change is exact."""
    build, _, most = NARROW[kind]
    base, tuned = nn.Sequential(build()), nn.Sequential(build())
    found = lr.extract_lora(base, tuned, rank=64, target=["0"])
    assert {extracted.b.shape[1] for extracted in found.values()} == {most}
    found.apply_(base)
    assert torch.allclose(base[0].weight, tuned[0].weight, atol=1e-5)


def two_labels():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))


def test_what_is_excluded_is_left_as_it_is():
    for exclude in (["2"], "2", lambda name, module: name == "2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = lr.add_lora_(two_labels(), rank=4, exclude=exclude)
        assert [type(layer) is nn.Linear for layer in model] == [False, False, True]


def test_excluding_a_part_of_a_fused_attention_leaves_the_others():
    attention = nn.MultiheadAttention(8, 2)
    lr.add_lora_(attention, ["in_proj_weight"], rank=2, exclude=["k_proj"])
    assert attention._adapted_names == ("q_proj", "v_proj")
    whole = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    lr.add_lora_(whole, ["q_proj", "out_proj"], rank=2, exclude=["in_proj_weight"])
    assert not hasattr(whole["a"], "_adapted_names")


def test_peft_reads_lowered_ranks(tmp_path):
    base, x = two_labels(), torch.randn(3, 8)
    with pytest.warns(UserWarning, match="lowered"):
        model = lr.add_lora_(copy.deepcopy(base), rank=4, alpha=6)
    scramble(model)
    lr.save_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {"^2": 2}
    theirs = peft().PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
    assert torch.allclose(lr.load_lora(base, tmp_path)(x), model(x), atol=1e-5)


def test_peft_files_with_a_rank_above_the_matrix_are_read_as_they_are(tmp_path):
    base, x = two_labels(), torch.randn(3, 8)
    theirs = wrapped(copy.deepcopy(base), ["0", "2"], r=6)
    theirs.save_pretrained(tmp_path)
    model = lr.load_lora(base, tmp_path)
    assert ranks_of(model) == {"0": 6, "2": 6}
    assert torch.allclose(model(x), theirs(x), atol=1e-5)


def low(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def with_weights(*ranks):
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in ranks])
    with torch.no_grad():
        for k, rank in enumerate(ranks):
            model[k].weight.copy_(low(12, 12, rank, k))
    return model


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "olora"])
def test_a_rule_reads_the_weight(init):
    model = lr.add_lora_(with_weights(3, 5), rank=lr.RelativeError(1e-4), init=init)
    assert ranks_of(model) == {"0": 3, "1": 5}


def test_a_rule_reads_what_the_init_takes_its_directions_from():
    model, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), low(64, 12, 4, 0)
    rule = lr.RelativeError(1e-2)
    stats = lr.calibrate(model, [x])
    fresh = copy.deepcopy(model)
    assert ranks_of(lr.add_lora_(fresh, ["0"], rank=rule, init=lr.EVA(stats))) == {"0": 4}
    gradients = {"0.weight": low(12, 12, 2, 1), "1.weight": low(12, 12, 5, 2)}
    fresh = copy.deepcopy(model)
    assert ranks_of(lr.add_lora_(fresh, rank=rule, init=lr.LoRAGA(gradients))) == {"0": 2, "1": 5}
    reference = {"0.weight": model[0].weight.detach() + low(12, 12, 3, 3), "1.weight": model[1].weight.detach() + 1}
    fresh = copy.deepcopy(model)
    lr.add_lora_(fresh, rank=rule, init=lr.LoftQ(reference))
    assert ranks_of(fresh) == {"0": 3, "1": 1}
    assert torch.allclose(fresh[0].weight, reference["0.weight"], atol=1e-4)


def test_corda_with_a_rule_reads_weight_times_moment():
    model, x = nn.Sequential(nn.Linear(12, 12)), torch.randn(256, 12)
    with torch.no_grad():
        model[0].weight.copy_(low(12, 12, 4, 0))
    lr.add_lora_(model, rank=lr.RelativeError(1e-4), init=lr.CorDA(lr.calibrate(model, [x])))
    assert ranks_of(model) == {"0": 4}


def test_a_fraction_of_the_parameters():
    model = lr.add_lora_(
        nn.Sequential(nn.Linear(32, 32), nn.Conv2d(8, 8, 3)), lambda *_: True, lr.ParameterFraction(0.25)
    )
    shares = [
        sum(p.numel() for p in layer.lora_weight.parameters()) / layer._parameters["weight"].numel() for layer in model
    ]
    assert all(0.1 < share <= 0.25 for share in shares)


def test_rules_in_a_pattern_and_patterns_of_parameters():
    model = nn.Sequential(with_weights(3, 5), nn.LSTM(6, 6))
    pattern = {"0.1": lr.RelativeError(1e-4), "weight_hh_l0": 3}
    lr.add_lora_(model, lambda *_: True, rank=2, rank_pattern=pattern)
    lstm = {
        name: len(getattr(model[1], f"lora_{name}").adapters["default"].A) for name in ("weight_ih_l0", "weight_hh_l0")
    }
    assert ranks_of(model[0]) == {"0": 2, "1": 5}
    assert lstm == {"weight_ih_l0": 2, "weight_hh_l0": 3}


def quarters(weight):
    return (weight * 4).round() / 4


def test_loftq_takes_rules_and_lowers_ranks():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
    kept = model[0].weight.detach().clone()
    values = torch.linalg.svdvals((kept - quarters(kept)).double()).square().cumsum(0)
    rank = int((values < 0.5 * values[-1]).sum()) + 1
    ruled = lr.loftq_(copy.deepcopy(model), lr.Energy(0.5), quarters)
    assert ranks_of(ruled)["0"] == rank
    with pytest.warns(UserWarning, match=r"loftq_: .*'1\.weight' to 3"):
        lr.loftq_(model, 6, quarters)
    assert ranks_of(model) == {"0": 6, "1": 3}


def test_eva_gives_no_layer_more_than_it_has():
    model, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2)), torch.randn(64, 12)
    lr.add_lora_(model, rank=4, init=lr.EVA(lr.calibrate(model, [x])))
    ranks = ranks_of(model)
    assert ranks["1"] <= 2
    assert sum(ranks.values()) == 8


TYPOS = {"rank_pattern": {"0": 2, "typo": 3}, "alpha_pattern": {"layer.9": 7.0}}


def test_keys_of_patterns_that_match_nothing_are_warned_of_like_the_peer(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(RuntimeWarning, match="did not match any targeted module") as theirs:
        peft().get_peft_model(copy.deepcopy(base), peft().LoraConfig(target_modules=["0"], **TYPOS))
    with pytest.warns(UserWarning, match="match no layer") as ours:
        model = lr.add_lora_(copy.deepcopy(base), ["0"], **TYPOS)
    for caught in (theirs, ours):
        words = "\n".join(str(each.message) for each in caught)
        assert re.search(r"rank_pattern.*\['typo'\]", words)
        assert re.search(r"alpha_pattern.*\['layer\.9'\]", words)
    assert all(each.filename == __file__ for each in ours)
    assert len(model[0].lora_weight.adapters["default"].A) == 2
    lr.save_lora(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"0": 2, "typo": 3}}))
    with pytest.warns(UserWarning, match=r"rank_pattern has the keys \['typo'\]") as ours:
        lr.load_lora(base, tmp_path)
    assert ours[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(UserWarning, match="typo"):
        lr.add_lora_(model, ["0"], **TYPOS)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())
    lr.add_lora_(model, rank_pattern={"0": 2, "1.weight": 3}, alpha_pattern={"1": 5.0})
