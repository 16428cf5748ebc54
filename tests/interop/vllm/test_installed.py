"""The linear layers and the loader of vLLM itself, where it is installed."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.interop.vllm import register
from tests.interop.vllm.test_serving import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, dense

import_torchvision()
pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture
def process():
    """One process of tensor parallelism."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.mark.parametrize("method", [lr.SVDMethod(), lr.PivotMethod()], ids=lambda method: method.name)
@pytest.mark.parametrize("skip", [(), ("q_proj", "gate_proj")], ids=["all", "some"])
@pytest.mark.parametrize("is_resized", [False, True], ids=["configured sizes", "fewer units"])
@torch.no_grad()
def test_layers_compute_what_the_model_does(process, tmp_path, method, skip, is_resized):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
    from vllm.model_executor.models.utils import AutoWeightsLoader

    model = dense()
    if is_resized:
        batches = [{"input_ids": torch.randint(50, (4, 16)), "use_cache": False}]
        lr.remove_units_(model, batches, lr.Budget(params=0.9))
    lr.factorize_(model, lr.make_plan(model, rank=5, methods=[method], skip=["lm_head", "embed_tokens", *skip]))
    model.save_pretrained(tmp_path)
    register()
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = get_quantization_config("lowrank").from_config(values)
    config.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    config.apply_vllm_mapper(LlamaModel.hf_to_vllm_mapper.get_rename_mapper())
    prefix, shared = "model.layers.0", {"quant_config": config, "params_dtype": torch.float32}
    root = torch.nn.Module()
    root.quant_config = config
    root.model = torch.nn.Module()
    root.model.layers = torch.nn.ModuleList([torch.nn.ModuleDict()])
    block = root.model.layers[0]
    block["self_attn"] = attention = torch.nn.ModuleDict()
    block["mlp"] = mlp = torch.nn.ModuleDict()
    attention["qkv_proj"] = QKVParallelLinear(
        HIDDEN, HEAD, HEADS, KV_HEADS, prefix=f"{prefix}.self_attn.qkv_proj", **shared
    )
    attention["o_proj"] = RowParallelLinear(HIDDEN, HIDDEN, False, prefix=f"{prefix}.self_attn.o_proj", **shared)
    mlp["gate_up_proj"] = MergedColumnParallelLinear(
        HIDDEN, [INNER, INNER], False, prefix=f"{prefix}.mlp.gate_up_proj", **shared
    )
    mlp["down_proj"] = RowParallelLinear(INNER, HIDDEN, False, prefix=f"{prefix}.mlp.down_proj", **shared)
    saved = [(name, t) for name, t in load_file(tmp_path / "model.safetensors").items() if "_proj." in name]
    loaded = AutoWeightsLoader(root).load_weights(iter(saved), mapper=LlamaModel.hf_to_vllm_mapper)
    assert {name for name, _ in root.named_parameters()} <= loaded
    theirs = model.model.layers[0]
    for name, parts in (
        ("self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        ("self_attn.o_proj", ["o_proj"]),
        ("mlp.gate_up_proj", ["gate_proj", "up_proj"]),
        ("mlp.down_proj", ["down_proj"]),
    ):
        layer = block.get_submodule(name)
        layer.quant_method.process_weights_after_loading(layer)
        own = [theirs.get_submodule(f"{name.partition('.')[0]}.{part}") for part in parts]
        x = torch.randn(7, own[0].in_features)
        torch.testing.assert_close(layer(x)[0], torch.cat([part(x) for part in own], -1), rtol=1e-5, atol=1e-5)
