"""``save_pretrained`` and ``from_pretrained`` of factored models: the same logits, in another process too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

import lowrank_layers as lr

from .models import KINDS, WORDS, output, tokens

LOADS = """
import sys
import lowrank_layers
from pathlib import Path
assert not any(name.partition(".")[0] == "transformers" for name in sys.modules)
import torch
from tests.interop.transformers import conftest
from tests.interop.transformers.models import KINDS, output
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = KINDS[folder.name].load(folder)
    torch.save(output(model, KINDS[folder.name].inputs()), folder / "output.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder per kind, each loaded and run in another process, which has written its output beside."""
    root = tmp_path_factory.mktemp("saved")
    for name, kind in KINDS.items():
        kind.factored().save_pretrained(root / name)
    subprocess.run(
        [sys.executable, "-c", LOADS, str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return root


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a folder but those of integers, which are the order of outputs in the pivot form."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found |= {name: tuple(part.get_shape()) for name, part in parts.items() if part.get_dtype()[0] != "I"}
    return found


def rounded(model: nn.Module) -> nn.Module:
    """The model in bfloat16 as from_pretrained makes it: frequencies of rotations stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_another_process_computes_the_same_bits(saved, name):
    kind = KINDS[name]
    model = kind.factored()
    assert sum(isinstance(module, lr.FactoredModule) for module in model.modules()) >= 5
    assert torch.equal(torch.load(saved / name / "output.pt"), output(model, kind.inputs()))


@pytest.mark.parametrize("name", KINDS)
def test_the_configuration_is_the_plan_and_the_file_has_its_size(saved, name):
    model = KINDS[name].factored()
    plan = lr.Plan.from_model(model)
    config = json.loads((saved / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lowrank"
    assert {name: layer["rank"] for name, layer in config["layers"].items()} == {each.name: each.rank for each in plan}
    written = sum(torch.Size(shape).numel() for shape in tensors(saved / name).values())
    assert written == plan.after.params
    assert plan.after.params < plan.total.params


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2", "t5"])
def test_shards_ties_and_generation(tmp_path, name):
    model = KINDS[name].factored()
    model.generation_config.max_new_tokens = 6
    model.generation_config.min_new_tokens = 6
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = KINDS[name].load(tmp_path)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "llama")
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    written = loaded.generate(**tokens(), do_sample=False)
    assert torch.equal(written, model.generate(**tokens(), do_sample=False))
    assert written.shape[1] >= 6


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_in_half_precision(saved, name, options):
    pytest.importorskip("accelerate")
    kind = KINDS[name]
    loaded = kind.load(saved / name, dtype=torch.bfloat16, **options)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(output(loaded, kind.inputs()), output(rounded(kind.factored()), kind.inputs()))


def test_layers_on_disk(saved, tmp_path):
    pytest.importorskip("accelerate")
    others = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(others, "cpu"), "model.layers.1": "disk"}
    loaded = KINDS["llama"].load(saved / "llama", device_map=places, offload_folder=tmp_path)
    assert loaded.model.layers[1].mlp.down_proj.up.weight.is_meta
    assert torch.equal(output(loaded, tokens()), output(KINDS["llama"].factored(), tokens()))


def test_a_loaded_model_is_an_ordinary_one(saved, tmp_path):
    loaded = KINDS["llama"].load(saved / "llama")
    before = output(loaded, tokens())
    loaded.save_pretrained(tmp_path)
    assert torch.equal(output(KINDS["llama"].load(tmp_path), tokens()), before)
    assert next(loaded.half().parameters()).dtype == torch.float16
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_dequantize_multiplies_out(saved):
    loaded = KINDS["llama"].load(saved / "llama")
    before = output(loaded, tokens())
    dense = loaded.dequantize()
    assert not any(isinstance(module, lr.FactoredModule) for module in dense.modules())
    torch.testing.assert_close(output(dense, tokens()), before)
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_made_dense_again_is_saved_as_such(saved, tmp_path, loaded):
    model = KINDS["llama"].load(saved / "llama") if loaded else KINDS["llama"].factored()
    lr.densify_(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(output(KINDS["llama"].load(tmp_path), tokens()), output(model, tokens()))


def test_saving_describes_the_layers_of_that_moment(saved, tmp_path):
    model = KINDS["llama"].load(saved / "llama")
    first, second = model.model.layers
    first.self_attn.o_proj = lr.LowRankLinear(64, 64, bias=False, rank=3)  # by hand, and in a part of the model:
    lr.densify_(second.self_attn)
    lr.factorize_(second.self_attn, lr.make_plan(second.self_attn, rank=5))
    model.save_pretrained(tmp_path)
    loaded = KINDS["llama"].load(tmp_path)
    assert loaded.model.layers[0].self_attn.o_proj.rank == 3
    assert loaded.model.layers[1].self_attn.v_proj.rank == 5
    assert torch.equal(output(loaded, tokens()), output(model, tokens()))


def test_saving_leaves_the_configuration_of_the_model_alone(tmp_path):
    model = KINDS["llama"].factored()
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    dense = KINDS["llama"].dense()
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_model_that_was_quantized_in_its_file_only(tmp_path):
    model = KINDS["llama"].factored()
    config = transformers.FineGrainedFP8Config(dequantize=True)  # as GGUF's where there is no kernel for it
    model.config.quantization_config = config
    model.hf_quantizer = quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(KINDS["llama"].load(tmp_path), tokens()), output(model, tokens()))
    assert model.config.quantization_config is config
    assert model.hf_quantizer is quantizer


def test_a_state_dict_that_is_passed_is_the_one_that_is_written(saved, tmp_path):
    model = KINDS["llama"].load(saved / "llama")
    model.save_pretrained(tmp_path, state_dict={name: 2 * value for name, value in model.state_dict().items()})
    twice = KINDS["llama"].load(tmp_path)
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice.parameters(), model.parameters(), strict=True))


def test_the_body_of_a_model_with_a_head(saved):
    body = transformers.AutoModel.from_pretrained(saved / "llama")
    assert type(body) is transformers.LlamaModel
    assert torch.equal(output(body, tokens()), output(KINDS["llama"].factored().model, tokens()))


def test_a_new_head_on_a_saved_body(saved):
    model = transformers.BertForSequenceClassification.from_pretrained(saved / "bert", num_labels=3)
    assert isinstance(model.bert.encoder.layer[0].output.dense, lr.LowRankLinear)
    assert torch.equal(output(model.bert, tokens()), output(KINDS["bert"].factored(), tokens()))


def test_another_head_than_the_saved_one(saved):
    model = transformers.LlamaForSequenceClassification.from_pretrained(saved / "llama", num_labels=3)
    assert torch.equal(output(model.model, tokens()), output(KINDS["llama"].factored().model, tokens()))


def test_names_of_an_older_version_of_transformers(saved, tmp_path):
    shutil.copytree(saved / "vit", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    layers, written = config["quantization_config"]["layers"], tensors(tmp_path)
    # weights are written under the names of old, so that these stand for a folder of old
    linear = ("LowRankLinear", "PivotLinear")
    (kind_of_layer,) = {layer["type"] for layer in layers.values()} & set(linear)
    old = {
        name.removesuffix(".up.weight"): {"type": kind_of_layer, "rank": shape[1], "bias": True}
        for name, shape in written.items()
        if name.endswith(".up.weight")
    }
    kept = {name: layer for name, layer in layers.items() if layer["type"] not in linear}
    assert len(old) + len(kept) == len(layers)
    config["quantization_config"]["layers"] = old | kept
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = KINDS["vit"]
    assert torch.equal(output(kind.load(tmp_path), kind.inputs()), output(kind.factored(), kind.inputs()))


def test_a_low_rank_head_of_a_model_whose_configuration_ties_it(tmp_path):
    model = KINDS["tied llama"].dense()
    model.lm_head = lr.LowRankLinear.from_dense(model.lm_head, rank=16)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(KINDS["llama"].load(tmp_path), tokens()), output(model, tokens()))


def test_layers_of_other_sizes(tmp_path):
    model = KINDS["llama"].dense()
    lr.remove_units_(model, [tokens()], lr.Budget(params=0.8))
    lr.factorize_(model, lr.make_plan(model, rank=8, skip=["lm_head", nn.Embedding]))
    model.save_pretrained(tmp_path)
    loaded = KINDS["llama"].load(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(output(loaded, tokens()), output(rounded(model), tokens()))


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own"


class Own(transformers.PreTrainedModel):
    """A model of one's own, with layers that transformers' models do not have."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.table = nn.EmbeddingBag(WORDS, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.last = nn.ConvTranspose1d(16, 24, 3)
        self.post_init()

    def forward(self, input_ids):
        x = self.layer(self.table(input_ids)[:, None])
        return (self.last(self.conv(x.reshape(-1, 8, 2, 2)).flatten(2)),)


def test_a_model_of_one_s_own_with_every_kind_of_layer(tmp_path):
    model = Own(OwnConfig()).eval()
    plan = lr.make_plan(model, rank=6)
    lr.factorize_(model, plan.set_rank("conv", (6, 6), method="tucker"))
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"TuckerConv2d", "LowRankEmbeddingBag", "LowRankConvTranspose1d", "LowRankMultiheadAttention"} <= kinds
    model.save_pretrained(tmp_path)
    assert torch.equal(output(Own.from_pretrained(tmp_path), tokens()), output(model, tokens()))


def test_a_pipeline(saved):
    plain = Tokenizer(models.WordLevel({f"w{k}": k for k in range(WORDS)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w96", pad_token="w0")
    settings = {"tokenizer": tokenizer, "max_new_tokens": 5, "do_sample": False}
    ours = transformers.pipeline("text-generation", model=str(saved / "llama"), **settings)
    theirs = transformers.pipeline("text-generation", model=KINDS["llama"].factored(), **settings)
    assert ours("w5 w6 w7") == theirs("w5 w6 w7")
