"""What other libraries do to whole models and their files, each case by its name."""

import ast
import copy
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_layers as lr

from ..contracts.tables import relative
from .peers import MORE, TIGHT, peer_conv, peer_warnings, tensorly_torch

pytestmark = peer_warnings


@pytest.mark.parametrize("mode", ["channel", "spatial"])
def test_spatial_conversion_is_noise(mode):
    """fasterai's ``spatial`` has nothing of the trained kernel: error 0.99, at any rank."""
    conv, x = nn.Conv2d(6, 8, 3, padding=1), torch.randn(2, 6, 7, 7)
    assert relative(lr.LowRankConv2d.from_dense(conv, rank=MORE, mode=mode)(x), conv(x)) < TIGHT
    separable = torch.einsum("or,rih,row->oihw", torch.ones(8, 3), torch.randn(3, 6, 3), torch.randn(3, 8, 3))
    with torch.no_grad():
        conv.weight.copy_(separable)
    layer = lr.LowRankConv2d.from_dense(conv, rank=3, mode="spatial")
    assert relative(layer.to_dense().weight, separable) < TIGHT
    assert relative(layer(x), conv(x)) < TIGHT


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_conversion_of_multihead_attention_breaks(training):
    """out_proj becomes a pair that torch's attention cannot read: an error on the next call."""
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    dense, x = copy.deepcopy(model), torch.randn(3, 5, 16)
    lr.factorize_(model, lr.make_plan(model, rank=MORE))
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert relative(model(x), dense(x)) < TIGHT
    small = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, rank=2))
    assert small.self_attn.rank == (2, 2, 2, 2)
    assert 1e-2 < relative(small(x), dense(x)) < 2


def test_shared_modules_come_apart():
    """A module under two names becomes two, which then learn different things."""
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleDict({"inner": shared})})
    before = sum(p.numel() for p in model.parameters())
    lr.factorize_(model, lr.make_plan(model, rank=2))
    assert model["a"][0] is model["b"]["inner"]
    assert isinstance(model["a"][0], lr.LowRankLinear)
    assert sum(p.numel() for p in model.parameters()) < before
    lr.densify_(model)
    assert model["a"][0] is model["b"]["inner"]


def test_the_conversion_of_a_model_throws_its_weights_away():
    """composer's puts in freshly drawn layers, under a test that only counts modules."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 10))
    dense, x = copy.deepcopy(model), torch.randn(4, 3, 7, 7)
    lr.factorize_(model, lr.make_plan(model, rank=MORE))
    assert [type(layer).__name__ for layer in model] == ["LowRankConv2d", "ReLU", "Flatten", "LowRankLinear"]
    assert relative(model(x), dense(x)) < TIGHT


@pytest.mark.parametrize("weight", ["fresh", "zero", "constant"])
def test_vbmf_gives_rank_0(weight):
    """On weights without structure variational Bayes keeps nothing: the layer has no channels and crashes."""
    linear, conv = nn.Linear(48, 32), nn.Conv2d(16, 24, 3)
    for dense in (linear, conv):
        if weight != "fresh":
            nn.init.constant_(dense.weight, 0.0 if weight == "zero" else 0.5)
    assert lr.LowRankLinear.from_dense(linear, rank=lr.EVBMF()).rank >= 1
    assert lr.LowRankConv2d.from_dense(conv, rank=lr.EVBMF()).rank >= 1
    layer = lr.TuckerConv2d.from_dense(conv, rank=lr.EVBMF())
    assert min(layer.rank) >= 1
    assert bool(layer(torch.randn(1, 16, 5, 5)).isfinite().all())


def test_the_factored_layer_is_slower_than_the_dense_one():
    """tensorly-torch's default rebuilds the kernel on every call and saves no operation (#35)."""
    conv, x = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 14, 14)

    def flops(module: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return counter.get_total_flops()

    for cls, rank in ((lr.LowRankConv2d, 8), (lr.TuckerConv2d, (8, 8)), (lr.CPConv2d, 16)):
        assert flops(cls.from_dense(conv, rank=rank)) < 0.5 * flops(conv)
    if tltorch := tensorly_torch():
        theirs = peer_conv(tltorch, conv, rank=(8, 8, 3, 3))
        assert flops(theirs) >= flops(conv)


def test_a_checkpoint_does_not_describe_itself(tmp_path):
    """Ranks have to be known before the file can be read; here the dense model is enough."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 25, 10))
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 7, 7)
    lr.factorize_(model, lr.make_plan(model, rank=3))
    lr.save(model, tmp_path / "model.safetensors")
    loaded = lr.load(tmp_path / "model.safetensors", into=fresh)
    assert torch.equal(loaded(x), model(x))


def test_dependencies_are_not_declared():
    """tensorly-torch imports torch and tensorly and declares neither (#13)."""
    folder = Path(lr.__file__).parent
    imported = set()
    # kv_cache/transformers is imported when LowRankCache is looked up: an extra, and its own error names it;
    # kv_cache/triton_kernels.py is imported on a GPU where Triton is; interop/vllm by vLLM
    later = {"transformers", "triton_kernels.py", "vllm"}
    for path in (p for p in folder.rglob("*.py") if not later & set(p.relative_to(folder).parts)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what runs when the package is imported
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"lowrank_layers"}
    assert foreign <= {"torch", "safetensors", "tqdm", "numpy"}
    declared = declared_by("lowrank-layers")
    assert foreign - {"numpy"} <= declared  # numpy by the extra of safetensors
    if tensorly_torch():
        assert not declared_by("tensorly-torch") & {"torch", "tensorly"}


def declared_by(distribution: str) -> set[str]:
    """What is installed with it, without extras."""
    lines = importlib.metadata.requires(distribution) or []
    return {re.split(r"[^\w.-]", line)[0].lower() for line in lines if "extra ==" not in line}
