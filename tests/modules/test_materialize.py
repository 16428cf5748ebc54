"""Filling a model on the meta device: ties of the model and of the file, models that are only partly empty."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision


class Net(nn.Module):
    def __init__(self, *, tied=True):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


@pytest.fixture
def path(tmp_path):
    model = Net()
    lr.factorize_(model, lr.make_plan(model, rank=4))
    lr.save(model, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_accelerates_empty_weights_lose_the_tie_and_get_it_back(path):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        empty = Net()
    assert empty.head.weight is not empty.embed.weight
    loaded = lr.load(path, into=empty)
    assert loaded.head.weight is loaded.embed.weight


def test_parameters_that_have_values_stay_the_same_objects(path):
    model = Net()
    model.mid = nn.Linear(8, 8, device="meta")
    weight = model.embed.weight
    loaded = lr.load(path, into=model)
    assert loaded.embed.weight is loaded.head.weight is weight
    assert not any(p.is_meta for p in loaded.parameters())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_that_differ_are_not_loaded_into_tied_ones(device, tmp_path):
    lr.save(Net(tied=False), tmp_path / "m.safetensors")
    with torch.device(device):
        model = Net()
    before = model.embed.weight
    with pytest.raises(lr.CheckpointError, match=r"'embed\.weight' and 'head\.weight' are one tensor in the model"):
        lr.load(tmp_path / "m.safetensors", into=model)
    assert model.head.weight is model.embed.weight is before


def test_a_model_without_ties_takes_a_file_with_them_as_it_is(path):
    loaded = lr.load(path, into=Net(tied=False))
    assert loaded.head.weight is not loaded.embed.weight
    assert torch.equal(loaded.head.weight, loaded.embed.weight)


def test_tensors_on_the_meta_device_that_are_no_buffers_are_named_too(path):
    with torch.device("meta"):
        empty = Net()
        empty.mid.table = torch.arange(4)
    with pytest.raises(lr.CheckpointError, match=r"'mid\.table'"):
        lr.load(path, into=empty)


def test_attentions_are_opened_on_the_meta_device(tmp_path):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    lr.factorize_(model, lr.make_plan(model, rank=2))
    lr.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    loaded = lr.load(tmp_path / "m.safetensors", into=empty)
    x = torch.randn(2, 5, 8)
    assert torch.equal(loaded(x), model(x))


def test_a_tiny_llama_names_its_frequencies(tmp_path):
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    model = transformers.LlamaForCausalLM(config).eval()
    lr.factorize_(model, lr.make_plan(model, rank=4))
    lr.save(model, tmp_path / "m.safetensors")
    with pytest.raises(lr.CheckpointError, match=r"rotary_emb\.inv_freq"):
        lr.load(tmp_path / "m.safetensors", into=empty)
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        empty = transformers.LlamaForCausalLM(config)
    loaded = lr.load(tmp_path / "m.safetensors", into=empty).eval()
    ids = torch.randint(97, (1, 6))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
