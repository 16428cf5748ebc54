"""torch's own tools on every layer: scripting, fusing a batch norm, replicas of nn.DataParallel."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import lowrank_layers as lr

from .tables import LAYERS, relative

replicate = importlib.import_module("torch.nn.parallel.replicate")
rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
fusable = pytest.mark.parametrize(
    "row",
    [row for row in LAYERS if row.cls.fuses_batch_norm and {"out_channels", "out_features"} & {*row.variants["plain"]}],
    ids=lambda row: row.name,
)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@rows
def test_scripting_is_refused_with_the_remedy(row):
    model = nn.Sequential(nn.Sequential(nn.Identity()), row.fresh())
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(lr.LowRankError, match=rf"torch\.jit\.script.*{row.cls.__name__}.*torch\.jit\.trace.*densify_"):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    x = row.input(row.dense())
    torch.jit.script(lr.densify_(copy.deepcopy(model)))  # the remedy
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))


def test_scripting_an_attention_is_refused():
    with pytest.raises(lr.LowRankError, match="LowRankMultiheadAttention"):
        torch.jit.script(nn.Sequential(lr.LowRankMultiheadAttention(8, 2, rank=2)))


def batch_norm(row) -> nn.Module:
    dims = {"Linear": 1}.get(row.cls.dense_type.__name__) or int(row.cls.dense_type.__name__[-2])
    settings = row.variants["plain"]
    norm = getattr(nn, f"BatchNorm{dims}d")(settings.get("out_channels") or settings["out_features"])
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.normal_()
        norm.bias.normal_()
    return norm.eval()


def fused(layer: nn.Module, norm: nn.Module) -> nn.Module:
    if isinstance(layer, (nn.Linear, lr.LowRankLinear)):
        return fuse_linear_bn_eval(layer, norm)
    return fuse_conv_bn_eval(layer, norm, getattr(layer, "transposed", False))


@fusable
def test_a_batch_norm_is_fused_into_the_last_factor(row):
    layer, norm = row.fresh().eval(), batch_norm(row)
    state, x = copy.deepcopy(layer.state_dict()), row.input(row.dense())
    expected = norm(layer(x))
    name = [name for name, _ in layer.named_children()][-1]
    with pytest.raises(lr.LowRankError, match=rf"fuse a batch norm into the last one \({name}\)"):
        fused(layer, norm)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    setattr(layer, name, fused(layer.last, norm))  # the remedy
    assert relative(layer(x), expected) < 1e-5


def test_fuse_modules_names_the_layer_and_takes_its_last_factor():
    model = nn.Sequential(lr.LowRankConv2d(3, 4, 3, rank=2), batch_norm(LAYERS_BY_NAME["LowRankConv2d"])).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.raises(AssertionError, match="LowRankConv2d"):  # torch's own refusal, before anything changes
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    assert torch.equal(model(x), expected)
    small = torch.ao.quantization.fuse_modules(model, [["0.up", "1"]])
    assert isinstance(small[1], nn.Identity)
    assert relative(small(x), expected) < 1e-5


LAYERS_BY_NAME = {row.name: row for row in LAYERS}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """torch's own replicas, only the copy to other devices replaced by one on the CPU."""

    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(torch._utils, "_get_all_device_indices", lambda: [0, 1])
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)


@rows
def test_a_replica_of_data_parallel_computes_and_learns_the_same(row, on_the_cpu):
    for variant in row.smoke:
        layer = row.fresh(variant)
        model = nn.Sequential(layer)
        x = row.input(layer.to_dense())
        _, replica = replicate.replicate(model, [0, 1])
        expected = model(x)
        assert torch.equal(replica(x), expected)
        assert torch.equal(replica[0].weight, layer.weight)
        weights = torch.randn(expected.shape)
        parameters = list(layer.parameters())
        theirs = torch.autograd.grad((replica(x) * weights).sum(), parameters)
        ours = torch.autograd.grad((model(x) * weights).sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)), variant
        with pytest.raises(lr.LowRankError, match="its weight is multiplied out"):
            replica[0].weight.data.zero_()
