"""Folders of transformers in the linear layers of vLLM, by a stand-in for it: the outputs are those of the model."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.errors import CheckpointError, LowRankError
from tests.interop.vllm import stand_in

import_torchvision()
transformers = pytest.importorskip("transformers")

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 32, 8, 4, 2, 48


def dense():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module", params=["svd", "pivot", "both"])
def folder(request, tmp_path_factory):
    """A saved model: query and gate dense in the third case, the others low-rank."""
    model = dense()
    method = {"svd": lr.SVDMethod(), "pivot": lr.PivotMethod(), "both": lr.PivotMethod()}[request.param]
    skip = ["lm_head", "embed_tokens"] + (["q_proj", "gate_proj"] if request.param == "both" else [])
    plan = lr.make_plan(model, rank=5, methods=[method], skip=skip)
    if request.param == "both":  # shards of both forms in one layer
        entry = lr.make_plan(model, rank=5, methods=[lr.SVDMethod()], skip=skip)
        lr.factorize_(model, lr.Plan([e for e in entry if e.name.endswith("k_proj")]))
        plan = lr.Plan([e for e in plan if not e.name.endswith("k_proj")])
    lr.factorize_(model, plan)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return SimpleNamespace(path=path, layer=model.model.layers[0])


def config_of(vllm, path):
    config = vllm.from_config(json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    config.packed_modules_mapping = PACKED
    return config


def fill(layer, prefix, path, config):
    """Loads a layer as vLLM does: names of parts become that of the whole, and tensors carry the part's key."""
    parent, _, own = prefix.rpartition(".")
    parts = PACKED.get(own, [own])
    keys = ["q", "k", "v"] if own == "qkv_proj" else range(len(parts)) if len(parts) > 1 else [None]
    parameters = dict(layer.named_parameters())
    mapper = config.get_checkpoint_weight_mapper()
    for saved_name, tensor in load_file(path / "model.safetensors").items():
        name = mapper.map_name(saved_name)
        for part, key in zip(parts, keys, strict=True):
            if not name.startswith(f"{parent}.{part}."):
                continue
            own_name = name.removeprefix(f"{parent}.{part}.")
            if own_name == "bias":  # by the layer itself, in vLLM
                place = list(keys).index(key)
                size, start = layer.local_outputs[place], sum(layer.local_outputs[:place])
                rank = layer.tp_rank // (layer.num_kv_head_replicas if place else 1)
                layer.bias.data[start : start + size] = tensor[rank * size :][:size]
                continue
            if key is not None:
                tensor.shard_id = key
            parameters[own_name].weight_loader(parameters[own_name], tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def built(kind, prefix, config, rank=0, size=1):
    sizes = {
        "qkv_proj": lambda: stand_in.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, True, config, prefix, rank, size),
        "o_proj": lambda: stand_in.RowParallelLinear(HIDDEN, HIDDEN, False, config, prefix, rank, size),
        "gate_up_proj": lambda: stand_in.MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], False, config, prefix, rank, size
        ),
        "down_proj": lambda: stand_in.RowParallelLinear(INNER, HIDDEN, False, config, prefix, rank, size),
    }
    return sizes[kind]()


CASES = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
@torch.no_grad()
def test_layers_compute_what_the_model_does(vllm, folder, kind, size):
    """In one process and in several, with as many key and value heads as processes, and with fewer."""
    config, prefix = config_of(vllm, folder.path), f"model.layers.0.{CASES[kind]}.{kind}"
    parts = [getattr(getattr(folder.layer, CASES[kind]), part) for part in PACKED.get(kind, [kind])]
    x = torch.randn(7, parts[0].in_features)
    expected = [part(x) for part in parts]
    processes = [fill(built(kind, prefix, config, rank, size), prefix, folder.path, config) for rank in range(size)]
    if kind in PACKED:
        outputs = [layer(x).split(layer.local_outputs, -1) for layer in processes]
        replicas = [max(1, size // KV_HEADS) if kind == "qkv_proj" and k else 1 for k in range(len(parts))]
        found = [torch.cat([outputs[rank][k] for rank in range(0, size, replicas[k])], -1) for k in range(len(parts))]
        for k, copies in enumerate(replicas):
            for rank in range(size):
                assert torch.equal(outputs[rank][k], outputs[rank - rank % copies][k])
    else:
        found = [sum(layer(own) for layer, own in zip(processes, x.chunk(size, -1), strict=True))]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_parameters_are_as_many_as_in_the_file(vllm, folder):
    """Where a layer is not split along its inputs."""
    saved = load_file(folder.path / "model.safetensors")
    for kind, place in CASES.items():
        prefix = f"model.layers.0.{place}.{kind}"
        config = config_of(vllm, folder.path)
        layer = fill(built(kind, prefix, config), prefix, folder.path, config)
        stems = [f"model.layers.0.{place}.{part}." for part in PACKED.get(kind, [kind])]
        expected = sum(t.numel() for n, t in saved.items() if n.startswith(tuple(stems)) and not n.endswith("bias"))
        assert sum(p.numel() for n, p in layer.named_parameters() if not n.endswith("bias")) == expected


def test_dense_layers_are_vllms_own(vllm, folder):
    config = config_of(vllm, folder.path)
    head = SimpleNamespace()
    assert config.get_quant_method(head, "lm_head") is None
    config.layers.pop("model.layers.0.self_attn.o_proj")
    layer = built("o_proj", "model.layers.0.self_attn.o_proj", config)
    assert type(layer.quant_method) is stand_in.UnquantizedLinearMethod


def test_names_follow_vllms_mapping(vllm, folder):
    config = config_of(vllm, folder.path)
    names = set(config.layers)
    mapper = SimpleNamespace(apply_dict=lambda values: {f"language_model.{k}": v for k, v in values.items()})
    config.apply_vllm_mapper(mapper)
    assert set(config.layers) == {f"language_model.{name}" for name in names}
    built("qkv_proj", "language_model.model.layers.0.self_attn.qkv_proj", config)
    saved = "model.layers.0.self_attn.k_proj"  # files have the names of before
    assert config.get_checkpoint_weight_mapper().map_name(f"{saved}.up.bias") == f"{saved}.bias"


def test_a_tensor_that_is_missing_or_of_another_shape_is_an_error(vllm, folder):
    config, prefix = config_of(vllm, folder.path), "model.layers.0.mlp.down_proj"
    layer = built("down_proj", prefix, config)
    with pytest.raises(CheckpointError, match=r"no model\.layers\.0\.mlp\.down_proj\.down\.weight"):
        layer.quant_method.process_weights_after_loading(layer)
    parameter = layer.get_parameter("up.weight")
    with pytest.raises(CheckpointError, match=r"got the shape \[3, 3\], expected \[32, 5\]"):
        parameter.weight_loader(parameter, torch.zeros(3, 3))
    with pytest.raises(CheckpointError, match="for the part 'q'"):
        parameter.weight_loader(parameter, torch.zeros(32, 5), "q")


def saved_config(tmp_path, model):
    model.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def test_what_vllm_cannot_serve_is_refused(vllm, tmp_path):
    model = dense()
    lr.factorize_(model, lr.make_plan(model, rank=4, skip=["lm_head", "mlp", "self_attn"]))
    with pytest.raises(CheckpointError, match=r"cannot serve 'model\.embed_tokens', a .*Embedding"):
        vllm.from_config(saved_config(tmp_path, model))
    for rank in (4, None):
        rounded = dense()
        plan = lr.make_plan(rounded, rank=4, skip=["lm_head", "embed_tokens", "mlp"], methods=[lr.SVDMethod()])
        for entry in plan:
            (plan if rank else plan.drop(entry.name)).set_bits(entry.name, 8)
        lr.factorize_(rounded, plan)
        with pytest.raises(CheckpointError, match=r"Linear.*floating point.*without bits="):
            vllm.from_config(saved_config(tmp_path, rounded))
    opened = {"layers": {}, "unfused": ["attention"], "version": 1}
    with pytest.raises(CheckpointError, match=r"'attention', an attention in four parts; plan with skip="):
        vllm.from_config(opened)


def test_low_rank_layers_that_vllm_has_no_linear_layer_for_are_refused(vllm, folder):
    config = config_of(vllm, folder.path)
    config.layers["lm_head"] = copy.copy(config.layers["model.layers.0.mlp.down_proj"])
    with pytest.raises(CheckpointError, match=r"'lm_head' is low-rank, but vLLM has no low-rank SimpleNamespace"):
        config.get_quant_method(SimpleNamespace(), "lm_head")


def test_one_weight_for_several_projections_is_served_in_one_process(vllm, folder):
    """As those of Phi-3, where the file has one weight for query, key and value."""
    config = config_of(vllm, folder.path)
    config.packed_modules_mapping = {}
    spec = config.layers["qkv_proj"] = config.layers["model.layers.0.mlp.down_proj"]
    layer = built("qkv_proj", "qkv_proj", config)
    layer.bias = None
    expected = getattr(lr, spec.type).from_dense(torch.nn.Linear(HIDDEN, sum(layer.local_outputs), bias=False), rank=5)
    for name, tensor in expected.state_dict().items():
        layer.get_parameter(name).weight_loader(layer.get_parameter(name), tensor)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, HIDDEN)
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(LowRankError, match="got tensor parallelism over 2 processes"):
        built("qkv_proj", "qkv_proj", config, size=2)


@torch.no_grad()
def test_biases_that_only_the_low_rank_layers_have(vllm, folder):
    """In several processes that add up their outputs they are added once."""
    config, prefix = config_of(vllm, folder.path), "model.layers.0.mlp.down_proj"
    spec = config.layers[prefix]
    config.layers[prefix] = dataclasses.replace(spec, bias=True)
    expected = getattr(lr, spec.type).from_dense(torch.nn.Linear(INNER, HIDDEN), rank=5)
    x, found = torch.randn(3, INNER), 0.0
    for rank, part in enumerate(x.chunk(2, -1)):
        layer = built("down_proj", prefix, config, rank, 2)
        for name, tensor in expected.state_dict().items():
            layer.get_parameter(name).weight_loader(layer.get_parameter(name), tensor)
        layer.quant_method.process_weights_after_loading(layer)
        found = found + layer(part)
    assert config.get_checkpoint_weight_mapper().map_name(f"{prefix}.up.bias") == f"{prefix}.up.bias"
    torch.testing.assert_close(found, expected(x), rtol=1e-5, atol=1e-5)
