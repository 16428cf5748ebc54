"""TorchScript, FX and adapters: what works gives the same output, what cannot is refused and nothing changes."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .test_adapters import adapted, models, run, scramble

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@models
def test_scripting_an_adapted_model_names_what_to_do(name):
    model, x, _ = adapted(name)
    out, keys = run(model, x), list(model.state_dict())
    with pytest.raises(lr.LowRankError, match=r"torch\.jit\.trace or torch\.export"):
        torch.jit.script(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, x), out)


@models
def test_tracing_an_adapted_model_keeps_the_adapters(name):
    model, x, base = adapted(name)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert torch.allclose(run(traced, x), run(model, x), atol=1e-5)
    assert not torch.allclose(run(traced, x), base, atol=1e-3)


LEAVES = (
    "linear",
    "linear without bias",
    "conv1d",
    "conv2d",
    "depthwise",
    "conv3d (1, 1, k)",
    "transposed",
    "embedding",
)


@pytest.mark.parametrize("name", LEAVES)
def test_fx_sees_the_adapters(name):
    model, x, base = adapted(name)
    traced = torch.fx.symbolic_trace(model)
    assert torch.allclose(run(traced, x), run(model, x), atol=1e-5)
    assert not torch.allclose(run(traced, x), base, atol=1e-3)


def test_a_graph_module_takes_adapters():
    plain, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 8)
    traced = torch.fx.symbolic_trace(plain)
    lr.add_lora_(traced, rank=2)
    scramble(traced)
    lr.merge_lora_(traced)
    want = plain(x)  # shares the modules
    lr.unmerge_lora_(traced)
    assert torch.allclose(traced(x), want, atol=1e-6)


def test_a_scripted_part_is_left_as_it_is():
    part = torch.jit.script(nn.Linear(8, 4))
    model, x = nn.Sequential(nn.Linear(8, 8), part), torch.randn(3, 8)
    base = model(x)
    with pytest.raises(lr.LowRankError, match="is scripted"):
        lr.add_lora_(model, ["0"], 2, modules_to_save=["1"])
    assert all(p.requires_grad for p in model.parameters())
    lr.add_lora_(model, lambda *_: True, rank=2)
    assert model[1] is part
    assert torch.equal(model(x), base)
    lr.use_adapter(lr.merge_lora_(model), "default")
    lr.remove_lora_(lr.unmerge_lora_(model))
    assert torch.equal(model(x), base)


LAZY = {
    "linear": lambda: nn.LazyLinear(4),
    "convolution": lambda: nn.LazyConv2d(4, 3),
    "buffers only": lambda: nn.LazyBatchNorm1d(affine=False),
}
CALLS = {
    "add_lora_": lambda model, folder: lr.add_lora_(model, ["0"], rank=2),
    "add_lora_ whole": lambda model, folder: lr.add_lora_(model, ["0"], rank=2, modules_to_save=["1"]),
    "loftq_": lambda model, folder: lr.loftq_(model, 2, lambda weight: weight.round(), target=["0"]),
    "load_lora": lambda model, folder: lr.load_lora(model, folder),
    "extract_lora": lambda model, folder: lr.extract_lora(model, model, rank=2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lazy", LAZY)
def test_lazy_modules_are_refused_before_anything_changes(lazy, call, tmp_path):
    lr.save_lora(lr.add_lora_(nn.Sequential(nn.Linear(8, 8)), rank=2), tmp_path)
    model = nn.Sequential(nn.Linear(8, 8), LAZY[lazy]())
    state = model[0].weight.clone()
    with pytest.raises(lr.LowRankError, match=r"not initialized yet.*run one batch"):
        CALLS[call](model, tmp_path)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, state)
    assert all(p.requires_grad for p in model.parameters())
