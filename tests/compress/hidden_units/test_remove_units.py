"""Removing hidden units: budgets, exactness where units are redundant, and models that stay usable."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.data import LeNet
from benchmarks.vision import import_torchvision
from lowrank_layers.modules import ModelDescription

LOSS = lr.SampledCrossEntropy()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def conv_net() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(160, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8))
    return model.eval()


def test_units_that_are_copies_of_others_go_without_a_trace():
    """Half of the units repeat the others, so that the model with half of them can be the same map."""
    wide, half = nn.Linear(6, 16), nn.Linear(6, 8)
    model = nn.Sequential(wide, nn.GELU(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        wide.weight.copy_(half.weight.repeat(2, 1))
        wide.bias.copy_(half.bias.repeat(2))
    x = torch.randn(300, 6, dtype=torch.float64)
    before = model(x)
    lr.remove_units_(model, [x], lr.Budget(params=6 * 8 + 8 + 8 * 4 + 4), damping=lr.Damping(inputs=0.0))
    assert model[0].out_features == model[2].in_features == 8
    assert torch.allclose(model(x), before, atol=1e-6)


def test_the_correction_is_a_regression_on_the_units_that_stay():
    model, x = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double(), torch.randn(400, 5).double()
    target = model(x).detach()
    lr.remove_units_(model, [x], lr.Budget(params=0.5), damping=lr.Damping(inputs=0.0, outputs=0.0))
    hidden = model[:2](x).detach()
    design = torch.cat([hidden, torch.ones(len(x), 1)], 1)
    solution = torch.linalg.lstsq(design, target).solution
    assert torch.allclose(torch.cat([model[2].weight.mT, model[2].bias[None]]), solution, atol=1e-8)


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
def test_the_budget_is_kept_by_the_last_unit_that_goes(fraction):
    model, images = conv_net(), [torch.randn(50, 3, 8, 8)]
    whole = params(model)
    lr.remove_units_(model, images, lr.Budget(params=fraction), loss=LOSS)
    dearest = max(27 + 2 + 90, 109 + 320, 161 + 5)  # of one unit, at full size
    assert fraction * whole - dearest < params(model) <= fraction * whole
    assert model(images[0]).shape == (50, 5)
    assert model[1].num_features == len(model[1].running_mean) == model[0].out_channels == model[3].in_channels


def test_units_that_hardly_vary_predict_nothing():
    """Their variance is the rounding of their products; a map that trusted it would have weights of millions."""
    model, x = nn.Sequential(nn.Linear(5, 40), nn.Sigmoid(), nn.Linear(40, 3)), 1e-5 * torch.randn(200, 5)
    before = model(x).detach()
    lr.remove_units_(model, [x], lr.Budget(params=0.5), loss=LOSS)
    assert float(model[2].weight.detach().abs().max()) < 1
    assert torch.allclose(model(x), before, atol=1e-5)


def low_rank() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    images, dense = torch.randn(200, 1, 28, 28), LeNet().eval()
    plan = lr.make_plan(dense, rank=4)
    plan.set_rank("conv1", 2, method="cp").set_rank("conv2", (5, 3), method="tucker")
    return lr.factorize_(dense, plan), images


def test_low_rank_layers_keep_their_kind_and_rank():
    model, images = low_rank()
    before = {name: (type(each), each.rank) for name, each in model.named_modules() if hasattr(each, "rank")}
    budget = int(0.5 * params(model))
    assert lr.remove_units_(model, [images], lr.Budget(params=budget), loss=LOSS) is model
    assert params(model) <= budget
    after = {name: (type(each), each.rank) for name, each in model.named_modules() if hasattr(each, "rank")}
    assert after == before
    assert model.fc1.out_features == model.fc2.in_features == model.fc2.down.in_features < 120
    assert model.conv2.out_channels * 16 == model.fc1.in_features
    dense = lr.densify_(copy.deepcopy(model))
    assert torch.allclose(dense(images), model(images), atol=1e-5)


def test_saved_and_loaded_into_the_dense_model(tmp_path):
    for k, small in enumerate([low_rank()[0], conv_net()]):
        images = torch.randn(50, *((1, 28, 28) if k == 0 else (3, 8, 8)))
        lr.remove_units_(small, [images], lr.Budget(params=0.6), loss=LOSS)
        lr.save(small, tmp_path / "small.safetensors")
        fresh = LeNet() if k == 0 else conv_net()
        loaded = lr.load(tmp_path / "small.safetensors", into=fresh).eval()
        assert torch.equal(loaded(images), small(images))
        assert ModelDescription.of(loaded) == ModelDescription.of(small)
        into_itself = lr.load(tmp_path / "small.safetensors", into=copy.deepcopy(small))
        assert torch.equal(into_itself(images), small(images))
        lr.save(lr.densify_(copy.deepcopy(small)), tmp_path / "dense.safetensors")
        dense = lr.load(tmp_path / "dense.safetensors", into=LeNet() if k == 0 else conv_net()).eval()
        assert torch.allclose(dense(images), small(images), atol=1e-5)


def test_a_file_is_not_loaded_into_another_model(tmp_path):
    small = lr.remove_units_(conv_net(), [torch.randn(20, 3, 8, 8)], lr.Budget(params=0.6))
    lr.save(small, tmp_path / "small.safetensors")
    swapped = conv_net()
    swapped[6] = nn.Conv2d(160, 20, 1)
    for other, words in ((swapped, "'6': was saved as Linear"), (conv_net()[:6], "'6': the model has no such layer")):
        with pytest.raises(lr.CheckpointError, match=words):
            lr.load(tmp_path / "small.safetensors", into=other)
    header = {"type": "Strange", "dtype": "float32"}
    with pytest.raises(lr.LowRankError, match="'0': got the layer description"):
        ModelDescription({}, resized={"0": header}).build(conv_net())


def test_a_pruned_model_can_be_factorized_and_recovered():
    model, images = conv_net(), torch.randn(40, 3, 8, 8)
    lr.remove_units_(model, [images], lr.Budget(params=0.6), loss=LOSS)
    whole = params(model)
    lr.factorize_(model, lr.make_plan(model, lr.Budget(params=0.5)))
    assert params(model) <= 0.5 * whole
    lr.recover_(model, [(images, torch.randint(5, (40,)))], steps=2)


def test_what_cannot_be_done_is_refused_and_nothing_changes():
    model, images = conv_net(), [torch.randn(20, 3, 8, 8)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for budget, data, words in (
        (lr.Budget(params=10), images, "parameters too many"),
        (lr.Budget(macs=0.5), images, "expected a limit on parameters alone"),
        (0.5, images, "expected a limit on parameters alone"),
        (lr.Budget(params=0.5), [], "no batches"),
        (lr.Budget(params=0.5), images[0], "expected a list of batches"),
    ):
        with pytest.raises(lr.LowRankError, match=words):
            lr.remove_units_(model, data, budget)
    with pytest.raises(lr.LowRankError, match="found no hidden units"):
        lr.remove_units_(nn.Sequential(nn.Linear(4, 4)), [torch.randn(5, 4)], lr.Budget(params=0.5))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_uniform_sizes_are_what_the_configuration_says(kind, tmp_path):
    """The folder is read without this library, and the model gives the same outputs."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config, cls = {
        "llama": (
            transformers.LlamaConfig(
                vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
            ),
            transformers.LlamaForCausalLM,
        ),
        "t5": (
            transformers.T5Config(
                vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
            ),
            transformers.T5ForConditionalGeneration,
        ),
        "bert": (
            transformers.BertConfig(
                vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
            ),
            transformers.BertForMaskedLM,
        ),
    }[kind]
    model = cls(config).eval()
    tokens = torch.randint(2, 60, (4, 24))
    batch = {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :9]} if kind == "t5" else {})
    whole = params(model)
    lr.remove_units_(model, [batch], lr.Budget(params=0.9), loss=LOSS, uniform=True)
    assert params(model) <= 0.9 * whole
    size = model.config.d_ff if kind == "t5" else model.config.intermediate_size
    assert size < 48
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    expected = model(**batch).logits
    torch.save((batch, expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules.update(lowrank_layers=None, torchvision=None)\n"
        "import transformers\n"
        f"model = transformers.{cls.__name__}.from_pretrained(sys.argv[1]).eval()\n"
        "batch, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_uniform_sizes_of_layers_that_are_alike():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 8))))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in (model, other):
            each[0].weight.mul_(0.1)
    x = [torch.randn(200, 8)]
    lr.remove_units_(model, x, lr.Budget(params=0.5), loss=LOSS)
    lr.remove_units_(other, x, lr.Budget(params=0.5), loss=LOSS, uniform=True)
    assert len({model[k].out_features for k in (0, 3, 6)}) > 1
    assert len({other[k].out_features for k in (0, 3, 6)}) == len({other[k].out_features for k in (2, 5)}) == 1
    assert params(other) <= 0.5 * 3 * (8 * 30 + 30 + 30 * 8 + 8)
