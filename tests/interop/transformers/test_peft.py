"""PEFT on factored models: on factors, on whole layers, merged, and with adapters of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_layers as lr

from .models import KINDS, output, tokens

peft = pytest.importorskip("peft")

# PEFT reads an attribute that newer versions of transformers deprecate
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
DENSE_ADAPTER = ["q_proj", "up_proj", "down_proj"]


METHODS = {"pairs": lr.SVDMethod(), "pivots": lr.PivotMethod()}


def saved(path: Path, form: str) -> Path:
    """A factored model, saved."""
    model = KINDS["llama"].dense()
    plan = lr.make_plan(model, lr.Budget(params=0.6, of="planned"), methods=[METHODS[form]])
    lr.factorize_(model, plan).save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with pairs of factors."""
    return saved(tmp_path_factory.mktemp("peft"), "pairs")


def load(folder: Path) -> Any:
    return KINDS["llama"].load(folder / "model")


def adapted(model: Any, target: Any) -> Any:
    """With an adapter whose values are not zero."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)).eval()


@pytest.mark.parametrize(
    ("form", "target"),
    [
        ("pairs", ["up_proj.down", "up_proj.up"]),
        ("pairs", "all-linear"),
        ("pairs", ["q_proj", "down"]),
        ("pivots", ["up_proj.down", "up_proj.up"]),
        ("pivots", "all-linear"),
    ],
    ids=str,
)
def test_factors_are_targets_that_train_save_and_merge(tmp_path, form, target):
    folder = saved(tmp_path, form)
    model = adapted(load(folder), target)
    model(**tokens()).logits.square().mean().backward()
    learn = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learn
    assert all(".lora_" in name for name in learn)
    assert any(".down.lora_A" in name for name in learn)
    expected = output(model, tokens())
    assert not torch.allclose(expected, output(load(folder), tokens()), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(again, tokens()), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(output(merged, tokens()), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(KINDS["llama"].load(tmp_path / "merged"), tokens()), output(merged, tokens()))


def test_a_low_rank_layer_as_a_whole_is_refused_by_peft(folder):
    with pytest.raises(ValueError, match=r"Target module LowRankLinear\([^@]*is not supported"):
        adapted(load(folder), ["up_proj"])


def with_dense_adapter(folder: Path, tmp_path: Path) -> tuple[Any, Any, Path]:
    """The dense model with an adapter, the adapter's config, and its folder."""
    dense = adapted(KINDS["llama"].dense(), DENSE_ADAPTER)
    dense.save_pretrained(tmp_path / "dense")
    return dense, peft.LoraConfig.from_pretrained(tmp_path / "dense"), tmp_path / "dense"


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LowRankLinear:UserWarning")
def test_an_adapter_of_the_dense_model_adds_the_same_to_the_factored_one(folder, tmp_path):
    dense, config, adapter = with_dense_adapter(folder, tmp_path)
    ours = lr.load_lora(load(folder), adapter)
    config._register_custom_module({lr.LowRankLinear: peft.tuners.lora.Linear})
    theirs = peft.PeftModel.from_pretrained(load(folder), adapter, config=config)
    assert torch.equal(output(ours, tokens()), output(theirs, tokens()))
    x = torch.randn(3, 64)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        with dense.disable_adapter():
            before = dense.base_model.model.model.layers[0].get_submodule(name)(x)
        delta = dense.base_model.model.model.layers[0].get_submodule(name)(x) - before
        plain, own = (model.model.layers[0].get_submodule(name)(x) for model in (load(folder), ours))
        torch.testing.assert_close(own - plain, delta, atol=1e-5, rtol=1e-5)


def test_without_registering_it_is_refused(folder, tmp_path):
    _, _, adapter = with_dense_adapter(folder, tmp_path)
    with pytest.raises(ValueError, match="LowRankLinear"):
        peft.PeftModel.from_pretrained(load(folder), adapter)


def test_an_adapter_in_the_folder_of_the_model(folder):
    model = load(folder)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=r".*mlp\..*\.(down|up)", init_lora_weights=False))
    expected = output(model, tokens())
    model.save_pretrained(folder / "own_adapter")
    again = load(folder)
    again.load_adapter(folder / "own_adapter")
    assert torch.equal(output(again, tokens()), expected)
