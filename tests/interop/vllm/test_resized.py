"""Models that have lost hidden units in the linear layers of vLLM, by a stand-in for it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.errors import CheckpointError
from lowrank_layers.layers.config import describe
from tests.interop.vllm import stand_in
from tests.interop.vllm.test_serving import HIDDEN, INNER, config_of, fill

import_torchvision()
transformers = pytest.importorskip("transformers")

UNITS = (36, 23)
"""Of the two blocks: the first number is divided by 2 and 4, the second by neither."""
MIXED = {
    "dense": [],
    "pairs": [lr.SVDMethod()],
    "pivots": [lr.PivotMethod()],
}


@pytest.fixture(scope="module", params=[(form, bias) for form in MIXED for bias in (False, True)], ids=str)
def folder(request, tmp_path_factory):
    """A saved model: its hidden units fewer, and layers of the perceptrons low-rank afterwards in some cases."""
    form, bias = request.param
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_bias=bias,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    batches = [{"input_ids": torch.randint(50, (4, 16))}]
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.9), stats, [lr.HiddenUnitsMethod()])
    for block, units in enumerate(UNITS):
        plan.set_rank(f"model.layers.{block}.mlp.down_proj", units)
    lr.factorize_(model, plan, stats)
    if MIXED[form]:
        skip = ["lm_head", "embed_tokens", "self_attn", "layers.0.mlp.gate_proj"]
        lr.factorize_(model, lr.make_plan(model, rank=5, methods=MIXED[form], skip=skip))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return SimpleNamespace(path=path, model=model, bias=bias)


class Perceptron(torch.nn.Module):
    """That of a Llama in process ``rank`` of ``size``, as vLLM writes it."""

    def __init__(self, folder, config, block, rank, size):
        super().__init__()
        prefix = f"model.layers.{block}.mlp"
        place = {"rank": rank, "size": size}
        gate_up = stand_in.MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], folder.bias, config, f"{prefix}.gate_up_proj", **place
        )
        down = stand_in.RowParallelLinear(INNER, HIDDEN, folder.bias, config, f"{prefix}.down_proj", **place)
        self.gate_up_proj = fill(gate_up, f"{prefix}.gate_up_proj", folder.path, config)
        self.down_proj = fill(down, f"{prefix}.down_proj", folder.path, config)
        self.act_fn = stand_in.SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
@torch.no_grad()
def test_perceptrons_compute_what_the_model_does(vllm, folder, block, size):
    """Also where the number of units is not divided by that of the processes, of which the last has fewer then."""
    theirs = folder.model.model.layers[block].mlp
    assert theirs.down_proj.in_features == UNITS[block]
    config, x = config_of(vllm, folder.path), torch.randn(7, HIDDEN)
    processes = [Perceptron(folder, config, block, rank, size) for rank in range(size)]
    torch.testing.assert_close(sum(each(x) for each in processes), theirs(x), rtol=1e-5, atol=1e-5)
    if size == 1:
        assert sum(p.numel() for p in processes[0].parameters()) == sum(
            tensor.numel() for tensor in theirs.state_dict().values()
        )


@torch.no_grad()
def test_fewer_units_than_processes(vllm, folder):
    """Processes without any unit add zeros."""
    config = config_of(vllm, folder.path)
    name = "model.layers.0.mlp.down_proj"
    config.layers.pop(name, None)
    config.resized[name] = {**config.resized[name], "in_features": 1, "bias": False}
    weight, x = torch.randn(HIDDEN, 1), torch.randn(3, 1)
    found = 0.0
    for rank in range(4):
        layer = stand_in.RowParallelLinear(INNER, HIDDEN, False, config, name, rank, 4)
        layer.weight.weight_loader(layer.weight, weight)
        layer.quant_method.process_weights_after_loading(layer)
        found = found + layer(x if rank == 0 else torch.zeros_like(x))
        assert rank == 0 or not layer.weight.any()
    torch.testing.assert_close(found, x @ weight.T)


def test_names_follow_vllms_mapping(vllm, folder):
    config = config_of(vllm, folder.path)
    mapper = SimpleNamespace(apply_dict=lambda values: {f"language_model.{k}": v for k, v in values.items()})
    config.apply_vllm_mapper(mapper)
    prefix = "language_model.model.layers.0.mlp.gate_up_proj"
    layer = stand_in.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], folder.bias, config, prefix)
    assert layer.quant_method.shards[0].resized["out_features"] == UNITS[0]
    saved = "model.layers.0.mlp.gate_proj.bias"  # files have the names of before
    expected = saved.replace(".bias", ".resized.bias") if folder.bias else saved
    assert config.get_checkpoint_weight_mapper().map_name(saved) == expected


def test_what_does_not_fit_together_is_refused(vllm, folder):
    config, prefix = config_of(vllm, folder.path), "model.layers.0.mlp"
    wide = copy.deepcopy(config)
    wide.resized[f"{prefix}.up_proj"]["out_features"] = 40
    apart = copy.deepcopy(config)
    del apart.resized[f"{prefix}.up_proj"]
    for wrong, words in ((wide, r"up_proj' \(32, 40\)"), (apart, "up_proj' as configured")):
        with pytest.raises(CheckpointError, match=rf"gate_proj' \(32, 36\), .*{words}, expected the same"):
            stand_in.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], False, wrong, f"{prefix}.gate_up_proj")
    config.resized["model.layers.0.self_attn.q_proj"] = config.resized[f"{prefix}.up_proj"]
    with pytest.raises(CheckpointError, match="is resized, but vLLM has no resized QKVParallelLinear"):
        stand_in.QKVParallelLinear(HIDDEN, 8, 4, 4, False, config, "model.layers.0.self_attn.qkv_proj")
    values = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    values["resized"]["model.conv"] = describe(torch.nn.Conv1d(8, 8, 3))
    with pytest.raises(CheckpointError, match=r"'model\.conv', a Conv1d of other sizes .*expected Linear; plan with"):
        vllm.from_config(values)
