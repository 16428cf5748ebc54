"""Folders of transformers whose models have ranks and int8: the same bits, in every dtype."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lowrank_layers as lr
from lowrank_layers.layers import bits_of

from .models import KINDS, output, tokens

NAMES = ["llama", "tied llama", "gpt2", "t5", "vit", "bert"]


def small(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Ranks in int8, and a few whole layers of each kind that there are."""
    model = KINDS[name].dense()
    for parameter in model.parameters():  # as from_pretrained: frequencies of rotations stay as they are
        parameter.data = parameter.data.to(dtype)
    plan = lr.make_plan(model, lr.Budget(params=0.6, bytes=0.9, of="planned"), bits=8)
    kinds = set()
    for entry in plan:
        kind = entry.layer["type"]
        if kind in ("Linear", "Embedding") and kind not in kinds:
            plan.drop(entry.name)
        if kind in ("Linear", "Embedding") or entry.method in ("svd", "pivot"):
            plan.set_bits(entry.name, 8)
        kinds.add(kind)
    return lr.factorize_(model, plan)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_has_the_same_bits(tmp_path, name, dtype):
    model = small(name, dtype)
    rounded = [each for each in model.modules() if bits_of(each) and not isinstance(each, lr.FactoredModule)]
    assert rounded
    assert any(bits_of(each) for each in model.modules() if isinstance(each, lr.FactoredModule))
    model.save_pretrained(tmp_path)
    loaded = KINDS[name].load(tmp_path)
    ours, theirs = state(model), state(loaded)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key
    inputs = KINDS[name].inputs()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        codes = [key for key in opened.keys() if key.endswith(".codes")]  # noqa: SIM118
        assert codes
        assert all(opened.get_slice(key).get_dtype() == "I8" for key in codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_changes_no_codes_and_no_scales(tmp_path, dtype):
    model = small("llama")
    model.save_pretrained(tmp_path)
    loaded = KINDS["llama"].load(tmp_path, dtype=dtype)
    for key, value in state(model).items():
        if key.endswith((".codes", ".scale")):
            assert torch.equal(value, loaded.state_dict()[key]), key
            assert value.dtype == loaded.state_dict()[key].dtype
    found = output(loaded, tokens())
    assert found.dtype == dtype
    assert (found.float() - output(model, tokens())).abs().max() < 0.05


def test_the_configuration_says_what_is_in_int8(tmp_path):
    model = small("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kinds = [(layer["type"], layer.get("bits")) for layer in config["layers"].values()]
    assert ("Int8Linear", None) in kinds
    assert ("Int8Embedding", None) in kinds
    assert {bits for kind, bits in kinds if not kind.startswith("Int8")} == {8}
    with pytest.raises(lr.LowRankError, match="remote_code"):
        model.save_pretrained(tmp_path, remote_code=True)


def test_a_model_is_generated_from_compiled_saved_and_made_dense(tmp_path):
    model = small("llama")
    model.generation_config.max_new_tokens = 5
    expected = model.generate(**tokens(), do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = KINDS["llama"].load(tmp_path)
    assert torch.equal(loaded.generate(**tokens(), do_sample=False), expected)
    dense = lr.densify_(copy.deepcopy(loaded))
    assert torch.allclose(output(dense, tokens()), output(model, tokens()), atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(output(KINDS["llama"].load(tmp_path / "dense"), tokens()), output(dense, tokens()))


def test_a_dense_model_is_stored_in_int8_while_it_is_loaded(tmp_path):
    dense = KINDS["llama"].dense()
    dense.save_pretrained(tmp_path / "dense")
    config = lr.LowRankConfig(budget=lr.Budget(bytes=0.3), bits=8)
    model = KINDS["llama"].load(tmp_path / "dense", quantization_config=config)
    assert sum(t.numel() * t.element_size() for t in model.state_dict().values()) <= 0.3 * 4 * dense.num_parameters()
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(output(KINDS["llama"].load(tmp_path / "small"), tokens()), output(model, tokens()))


def test_a_missing_tensor_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    small("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if key.endswith(".scale"))]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(lr.CheckpointError, match=r"\.scale"):
        KINDS["llama"].load(tmp_path)


def test_adapters_train_on_top_of_it():
    model = small("llama")
    before = state(model)
    lr.add_lora_(model, rank=2, target=["q_proj", "down_proj"])
    optimizer = torch.optim.SGD(lr.lora_parameters(model), lr=0.1)
    first = output(model, tokens())
    model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(output(model, tokens()), first)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items() if key.endswith(".codes"))


def test_embeddings_are_not_resized_silently():
    model = small("llama")
    with pytest.raises(lr.LowRankError, match="cannot be resized"):
        model.resize_token_embeddings(120)
