"""``LowRankMultiheadAttention`` is an ordinary torch module: signature, state, copies, compilers, exporters."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from ..contracts.tables import relative
from .attention_calls import (
    EMBED,
    FEW,
    HEADS,
    KDIM,
    TIGHT,
    VDIM,
    Attention,
    Call,
    assert_same,
    attention_masks,
    calls,
    few,
    padding_masks,
    small,
)


def test_the_signatures_begin_with_torchs():
    for ours, torchs in ((Attention, nn.MultiheadAttention), (Attention.forward, nn.MultiheadAttention.forward)):
        expected = [(p.name, p.default) for p in inspect.signature(torchs).parameters.values()]
        own = list(inspect.signature(ours).parameters.values())
        assert [(p.name, p.default) for p in own[: len(expected)]] == expected
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in own[len(expected) :])
    with pytest.raises(TypeError, match="rank"):
        Attention(EMBED, HEADS)


@calls
def test_the_constructor_takes_the_settings_that_from_dense_takes(call):
    widths = {"kdim": KDIM, "vdim": VDIM} if call.separate else {}
    fresh = Attention(EMBED, HEADS, **call.settings, **widths, rank=2)
    layer = small(call)
    assert repr(fresh) == repr(layer)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    x = call.inputs()
    assert_same(fresh(*x), layer(*x), 1e-12)


@calls
def test_a_fresh_layer_is_finite_and_learns(call):
    widths = {"kdim": KDIM, "vdim": VDIM} if call.separate else {}
    layer = Attention(EMBED, HEADS, **call.settings, **widths, rank=4)
    x = call.inputs()
    for name, parameter in layer.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert float(parameter.detach().abs().max()) > 0, name
    target = torch.randn(layer(*x)[0].shape)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (layer(*x)[0] - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_fresh_layer_follows_the_seed():
    torch.manual_seed(3)
    first = Attention(EMBED, HEADS, add_bias_kv=True, rank=2)
    second = Attention(EMBED, HEADS, add_bias_kv=True, rank=2)
    torch.manual_seed(3)
    again = Attention(EMBED, HEADS, add_bias_kv=True, rank=2)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert not torch.equal(parameter, second.get_parameter(name)), name


def test_device_and_dtype_of_the_constructor():
    layer = Attention(EMBED, HEADS, add_bias_kv=True, device="meta", dtype=torch.float64, rank=(2, None, 2, 2))
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@few
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_clones_compute_the_same_and_stand_alone(call, clone):
    layer = small(call).eval()
    other = clone(layer)
    x = call.inputs()
    assert repr(other) == repr(layer)
    assert not other.training
    assert torch.equal(other(*x)[0], layer(*x)[0])
    with torch.no_grad():
        other.q_proj.down.weight.zero_()
    assert bool(layer.q_proj.down.weight.any())


@few
def test_state_dict_round_trip(call, tmp_path):
    layer = small(call)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other = small(call)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    x = call.inputs()
    assert torch.equal(other(*x)[0], layer(*x)[0])


@pytest.mark.parametrize("call", FEW[2:], ids=lambda call: call.name)
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_compiles_into_one_graph(call, weights):
    torch._dynamo.reset()
    layer = small(call)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mask in ({}, {"attn_mask": attention_masks(call)["bool"], "key_padding_mask": padding_masks(call)["bool"]}):
        leaves = [x.clone().requires_grad_() for x in call.inputs()]
        got, expected = (module(*leaves, **mask, need_weights=weights) for module in (compiled, layer))
        assert_same(got, expected)
        grads = [torch.autograd.grad(out[0].square().sum(), leaves) for out in (got, expected)]
        for ours, eager in zip(*grads, strict=True):
            assert relative(ours, eager) < TIGHT


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_exports_with_dynamic_batch_and_lengths(weights):
    call = Call({"batch_first": True})
    layer = small(call).eval()
    batch, length, source = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length", "source"))
    shapes = ({0: batch, 1: length}, {0: batch, 1: source}, {0: batch, 1: source}, {0: batch, 1: source}, None)
    x = (*call.inputs(), padding_masks(call)["bool"], weights)
    program = torch.export.export(layer, x, dynamic_shapes=shapes).module()
    sizes = torch.randn(5, 3, EMBED), torch.randn(5, 7, EMBED), torch.randn(5, 7, EMBED)
    padding = torch.zeros(5, 7, dtype=torch.bool)
    padding[:, -2:] = True
    assert_same(program(*sizes, padding, weights), layer(*sizes, padding, weights))
