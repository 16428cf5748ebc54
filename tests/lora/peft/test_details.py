"""What PEFT's files say beside ranks: groups, stacks of matrices, layers, names, conversions, dropout."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

from ..peer import known_warnings
from .models import Experts, gpt2, llama, mlp, peft, run, scramble, tokens, transformers

pytestmark = known_warnings


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_with_an_a_that_is_zero_elsewhere(groups, tmp_path):
    base, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups)), torch.randn(2, 8, 6, 6)
    model = lr.add_lora_(copy.deepcopy(base), ["0"], rank=2, alpha=3, init="gaussian")
    scramble(model)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(
        run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5
    )
    assert torch.allclose(run(lr.load_lora(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_as_target_parameters(is_transposed, tmp_path):
    base, x = nn.Sequential(nn.Linear(8, 8), Experts(is_transposed)), torch.randn(4, 8)
    model = lr.add_lora_(copy.deepcopy(base), ["0", "1.up", "1.down"], rank=2, alpha=3, rank_pattern={"0": 3})
    scramble(model)
    lr.save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, x), run(model, x), atol=1e-4)
    assert torch.allclose(run(lr.load_lora(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5)
    config = peft.LoraConfig(r=2, target_modules=["0"], target_parameters=["1.up", "down"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "theirs"), x), run(theirs, x), atol=1e-4)


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_what_peft_computes_wrong_is_the_delta_in_the_weight(settings, tmp_path):
    """PEFT's convolution to ``A`` has neither dilation nor padding mode (#3697); the file is the same."""
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, **settings)), torch.randn(2, 4, 9, 9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        dense[0].weight += theirs.base_model.model[0].get_delta_weight("default")
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(dense, x), atol=1e-5)


def test_pissa_of_peft_once_converted_and_only_then(tmp_path):
    base, x = mlp(), torch.randn(4, 8)
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "as it is")
    out = run(theirs, x)
    with pytest.raises(lr.CheckpointError, match="'pissa': this adapter goes with a base"):
        lr.load_lora(base, tmp_path / "as it is")
    theirs.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "new"), x), out, atol=1e-5)


def test_only_some_layers(tmp_path):
    base, x = llama(), tokens()
    where = {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], **where)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(theirs, x), atol=1e-5)
    names = [name for name, module in base.named_modules() if isinstance(module, Adapter)]
    assert len(names) == 2


def test_a_classifier_of_transformers_and_its_tables(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, intermediate_size=24, num_labels=3, max_position_embeddings=12)
    base, x = transformers.RobertaForSequenceClassification(config), tokens() + 3
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "word_embeddings"])
    theirs = peft.get_peft_model(copy.deepcopy(base), lora)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(theirs, x), atol=1e-5)


def test_a_name_that_ends_other_names_is_written_as_an_expression(tmp_path):
    base, x = nn.Sequential(), torch.randn(3, 8)
    base.add_module("fc", nn.Linear(8, 8))
    base.add_module("block", nn.Sequential())
    base.block.add_module("fc", nn.Linear(8, 8))
    model = lr.add_lora_(copy.deepcopy(base), "fc", rank=2)
    scramble(model)
    lr.save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, x), run(model, x), atol=1e-5)
    assert not any("block" in key and "lora_" in key for key in theirs.state_dict())


def test_onto_a_compressed_layer_and_beside_another_adapter(tmp_path):
    base, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model = lr.add_lora_(copy.deepcopy(base), rank=2)
    scramble(model)
    lr.save_lora(model, tmp_path)
    small = nn.Sequential(lr.LowRankLinear.from_dense(base[0], rank=3))
    lr.load_lora(small, tmp_path, "first")
    delta = run(model, x) - run(base, x)
    plain = run(nn.Sequential(lr.LowRankLinear.from_dense(base[0], rank=3)), x)
    assert torch.allclose(run(small, x) - plain, delta, atol=1e-5)
    lr.load_lora(small, tmp_path, "second")
    assert torch.allclose(run(small, x) - plain, 2 * delta, atol=1e-5)
    with pytest.raises(lr.CheckpointError, match="'0' has an adapter 'first' already"):
        lr.load_lora(small, tmp_path, "first")
    with pytest.raises(lr.LowRankError, match="give the name"):
        lr.save_lora(small, tmp_path)
    with pytest.raises(lr.UnsupportedLayerError, match=r"'0\.weight', which is a LowRankLinear: call densify_"):
        lr.save_lora(small, tmp_path, "first")


def test_torch_files(tmp_path):
    model, x = mlp(), torch.randn(3, 8)
    adapted = lr.add_lora_(copy.deepcopy(model), rank=2)
    scramble(adapted)
    lr.save_lora(adapted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    assert torch.allclose(run(lr.load_lora(model, tmp_path), x), run(adapted, x), atol=1e-6)


def test_onto_a_model_in_eval_mode_nothing_drops_out(tmp_path):
    base, x = gpt2().eval(), tokens()
    model = lr.add_lora_(copy.deepcopy(base), ["c_attn"], rank=2, dropout=0.5)
    scramble(model)
    lr.save_lora(model, tmp_path)
    loaded = lr.load_lora(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, loaded(x).logits)
        assert torch.allclose(loaded(x).logits, run(model, x), atol=1e-6)
        assert not torch.equal(loaded.train()(x).logits, loaded(x).logits)
