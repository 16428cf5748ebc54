"""``from_pretrained(dense_folder, quantization_config=LowRankConfig(...))``: factorized as soon as it is loaded."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import ModelDescription

from .models import KINDS, output


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of dense models."""
    root = tmp_path_factory.mktemp("dense")
    for name in ("llama", "t5"):
        KINDS[name].dense().save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings",
    [{"budget": lr.Budget(params=0.7)}, {"rank": 8}, {"rank": lr.Energy(0.9), "skip": ["lm_head", nn.Embedding]}],
    ids=["budget", "rank", "rule"],
)
def test_it_is_what_factorize_makes_of_the_loaded_model(dense, tmp_path, name, settings):
    kind = KINDS[name]
    model = kind.load(dense / name, quantization_config=lr.LowRankConfig(**settings))
    expected = kind.dense()
    lr.factorize_(expected, lr.make_plan(expected, **settings))
    assert torch.equal(output(model, kind.inputs()), output(expected, kind.inputs()))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(kind.load(tmp_path), kind.inputs()), output(expected, kind.inputs()))


def test_by_a_plan(dense):
    plan = lr.make_plan(KINDS["llama"].dense(), rank=5)
    model = KINDS["llama"].load(dense / "llama", quantization_config=lr.LowRankConfig(plan=plan))
    assert {each.name: each.rank for each in lr.Plan.from_model(model)} == {
        each.name: each.rank for each in plan if each.method != "dense"
    }


def test_in_half_precision_on_a_device(dense, tmp_path):
    pytest.importorskip("accelerate")
    config = lr.LowRankConfig(rank=8)
    model = KINDS["llama"].load(dense / "llama", quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.lm_head, lr.LowRankLinear)
    assert json.loads(model.config.to_json_string())["quantization_config"]["layers"]["lm_head"]["rank"] == 8


def test_the_configuration_prints_before_and_after(dense):
    config = lr.LowRankConfig(rank=8)
    assert repr(config) == "LowRankConfig(rank=8)"
    model = KINDS["llama"].load(dense / "llama", quantization_config=config)
    assert repr(model.config.quantization_config) == f"LowRankConfig({len(lr.Plan.from_model(model))} layers)"
    assert '"rank": 8' in repr(model.config)


def test_what_cannot_be_done_is_refused(dense, tmp_path):
    with pytest.raises(lr.LowRankError, match="nothing to factorize by"):
        lr.LowRankConfig()
    with pytest.raises(lr.LowRankError, match="got budget and rank"):
        lr.LowRankConfig(budget=lr.Budget(params=0.5), rank=3)
    with pytest.raises(lr.LowRankError, match=r"write Budget\(params=0.5\)"):
        lr.LowRankConfig(budget=0.5)
    described = lr.LowRankConfig(description=ModelDescription.of(KINDS["llama"].factored()))
    with pytest.raises(lr.LowRankError, match="holds a dense model"):
        KINDS["llama"].load(dense / "llama", quantization_config=described)
    with pytest.raises(lr.BudgetError):
        KINDS["llama"].load(dense / "llama", quantization_config=lr.LowRankConfig(budget=lr.Budget(params=0.01)))
    pytest.importorskip("accelerate")
    with pytest.raises(lr.LowRankError, match="spread over several devices"):
        KINDS["llama"].load(
            dense / "llama",
            quantization_config=lr.LowRankConfig(rank=8),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path,
        )


def test_a_factored_folder_keeps_its_own_layers(dense, tmp_path):
    KINDS["llama"].factored().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = KINDS["llama"].load(tmp_path, quantization_config=lr.LowRankConfig(rank=2))
    assert lr.Plan.from_model(model).after == lr.Plan.from_model(KINDS["llama"].factored()).after


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(lr.MissingExtraError, match=r"lowrank-layers\[transformers\]"):
        lr.LowRankConfig  # noqa: B018


def test_a_model_that_is_quantized_otherwise_is_not_described(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    KINDS["llama"].dense().save_pretrained(tmp_path / "dense")
    config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = KINDS["llama"].load(tmp_path / "dense", quantization_config=config)
    model.model.layers[0].mlp.up_proj = lr.LowRankLinear(64, 96, bias=False, rank=3)
    with pytest.raises(lr.LowRankError, match="quantized with 'torchao'"):
        model.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()
