"""Replicas of ``nn.DataParallel``: torch's own code, only the copy to other devices replaced by one on the CPU."""

import copy
import importlib

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .peer import wrapped
from .test_adapters import FACTORED, MODELS, adapted, run

replicate = importlib.import_module("torch.nn.parallel.replicate")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(torch._utils, "_get_all_device_indices", lambda: [0, 1])
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)


@pytest.mark.parametrize(
    ("name", "dora"), [(name, dora) for name in MODELS for dora in (False, True) if not (dora and name in FACTORED)]
)
def test_replicas_compute_and_learn_what_the_model_does(name, dora):
    model, x, base = adapted(name, dora=dora)
    out = run(model, x)
    out.square().sum().backward()
    expected = [p.grad.clone() for p in lr.lora_parameters(model)]
    model.zero_grad()
    first, second = replicate.replicate(model, [0, 1])
    assert torch.equal(run(first, x), out)
    run(second, x).square().sum().backward()
    for parameter, gradient in zip(lr.lora_parameters(model), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(run(second, x), out, atol=1e-5)  # torch's fast paths
    with lr.lora_disabled(model):
        (replica,) = replicate.replicate(model, [0])
        assert torch.equal(run(replica, x), base)
    assert torch.equal(run(model, x), out)


@pytest.mark.parametrize("merged", [False, True])
def test_replicas_of_a_part_of_a_fused_attention(merged):
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), torch.randn(2, 5, 16)
    lr.add_lora_(model, ["q_proj", "v_proj", "out_proj"], rank=2, init="olora")
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    if merged:
        lr.merge_lora_(model)
    (replica,) = replicate.replicate(model, [0])
    assert torch.equal(run(replica, x), run(model, x))


def test_a_replica_that_gets_a_part_of_the_batch_has_no_rows_for_it():
    model, x = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2, name="a"), torch.randn(4, 8)
    with lr.lora_rows(model, ["a", None, "a", None]):
        (replica,) = replicate.replicate(model, [0])
        with pytest.raises(lr.LowRankError, match=r"got 4 names.* 2 samples"):
            replica(x[:2])


def test_an_adapted_weight_of_the_model_itself_is_set_to_a_parameter_only():
    model = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2)
    before, new = copy.deepcopy(model), nn.Parameter(torch.zeros(6, 8))
    with pytest.raises(TypeError, match=r"nn\.Parameter"):
        model[0].weight = torch.zeros(6, 8)
    assert torch.equal(model[0].weight, before[0].weight)
    model[0].weight = new
    assert model[0]._parameters["weight"] is new


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.embed(x)) + nn.functional.linear(self.embed(x), self.head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_of_whole_modules_and_of_rows(dtype):
    model, x = Net().to(dtype), torch.randint(9, (4, 3))
    lr.add_lora_(model, [], modules_to_save=["head"], trainable_tokens=[2, 5])
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    out = model(x)
    out.float().square().sum().backward()
    expected = [p.grad.clone() for p in lr.lora_parameters(model)]
    model.zero_grad()
    first, second = replicate.replicate(model, [0, 1])
    assert torch.equal(first(x), out)
    second(x).float().square().sum().backward()
    for parameter, gradient in zip(lr.lora_parameters(model), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)
    with lr.lora_disabled(model):
        base = model(x)
        (replica,) = replicate.replicate(model, [0])
        assert torch.equal(replica(x), base)


def test_replicas_of_an_adapter_that_mixes_the_groups_of_a_convolution(tmp_path):
    base, x = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), torch.randn(2, 4, 9)
    wrapped(copy.deepcopy(base), ["0"]).save_pretrained(tmp_path)
    plain, model = base(x), lr.load_lora(copy.deepcopy(base), tmp_path)
    out = model(x)
    assert not torch.allclose(out, plain, atol=1e-2)
    (replica,) = replicate.replicate(model, [0])
    assert torch.equal(replica(x), out)
    with torch.no_grad():
        half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
