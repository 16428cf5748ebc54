"""``LowRankMultiheadAttention`` computes what ``nn.MultiheadAttention`` computes, however it is called."""

import copy

import pytest
import torch
from torch import Tensor

import lowrank_layers as lr

from ..contracts.tables import HALF_TOLERANCE, relative
from .attention_calls import (
    EMBED,
    FEW,
    LENGTH,
    PROJECTIONS,
    TIGHT,
    Attention,
    Call,
    assert_same,
    attention_masks,
    calls,
    few,
    full,
    masks,
    padding_masks,
    small,
)


@calls
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_full_rank_computes_what_torch_computes(call, training):
    dense = call.dense().train(training)
    layer = full(dense)
    x = call.inputs()
    for mask in masks(call):
        for weights in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            expected = dense(*x, **mask, **weights)
            assert_same(layer(*x, **mask, **weights), expected)
            with torch.no_grad():  # in eval mode torch takes its fast path here
                assert_same(layer(*x, **mask, **weights), dense(*x, **mask, **weights))


@calls
def test_without_gradients_torchs_fast_path_gives_the_same(call):
    dense = call.dense().eval()
    layer = full(dense)
    x = call.inputs()
    with torch.inference_mode():
        for mask in masks(call):
            for weights in (True, False):
                assert_same(layer(*x, **mask, need_weights=weights), dense(*x, **mask, need_weights=weights))


@few
def test_gradients_are_those_of_torch(call):
    dense = call.dense()
    layer = full(dense)
    for mask in masks(call):
        for weights in (True, False):
            found = []
            for module in (dense, layer):
                torch.manual_seed(5)
                leaves = [x.clone().requires_grad_() for x in call.inputs()]
                out, scores = module(*leaves, **mask, need_weights=weights)
                loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
                if scores is not None:
                    loss = loss + scores.square().sum()
                found.append(torch.autograd.grad(loss, leaves))
            for ours, torchs in zip(*reversed(found), strict=True):
                assert relative(ours, torchs) < TIGHT


@few
def test_gradients_of_the_parameters_are_those_of_torch(call):
    """With all projections dense nothing but the layout of the weights differs."""
    dense = call.dense()
    layer = Attention.from_dense(dense, rank=None)
    x = call.inputs()
    for module in (dense, layer):
        module(*x)[0].square().sum().backward()
    parts = [getattr(layer, name) for name in PROJECTIONS]
    if call.separate:
        expected = [getattr(dense, f"{name}_weight").grad for name in PROJECTIONS[:3]]
    else:
        expected = list(dense.in_proj_weight.grad.chunk(3))
    for part, grad in zip(parts, [*expected, dense.out_proj.weight.grad], strict=True):
        assert relative(part.weight.grad, grad) < TIGHT
    if dense.in_proj_bias is not None:
        # the bias of the keys moves all scores alike: its gradient is zero but for rounding
        for k, grad in ((0, dense.in_proj_bias.grad[:EMBED]), (2, dense.in_proj_bias.grad[2 * EMBED :])):
            assert relative(parts[k].bias.grad, grad) < TIGHT
    for name in ("bias_k", "bias_v"):
        if getattr(dense, name) is not None:
            assert relative(getattr(layer, name).grad, getattr(dense, name).grad) < TIGHT


def causal_mask(dtype: torch.dtype | None = None) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return mask if dtype is None else torch.zeros(LENGTH, LENGTH, dtype=dtype).masked_fill_(mask, float("-inf"))


@pytest.mark.parametrize("call", [c for c in FEW if not c.cross], ids=lambda call: call.name)
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_is_causal_is_a_hint_about_the_mask(call, dtype, weights, padded):
    dense = call.dense()
    layer = full(dense)
    x = call.inputs()
    padding = padding_masks(call)["bool" if dtype is None else "float"] if padded else None
    settings = {"attn_mask": causal_mask(dtype), "key_padding_mask": padding, "need_weights": weights}
    for training in (True, False):
        dense.train(training)
        layer.train(training)
        expected = dense(*x, **settings)
        assert_same(layer(*x, **settings, is_causal=True), expected)
        assert_same(dense(*x, **settings, is_causal=True), expected)
        with torch.no_grad():
            assert_same(layer(*x, **settings, is_causal=True), expected)


@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_the_causal_hint_does_not_hide_the_added_key(extra):
    """The mask is what counts: torch itself drops it for the hint and then masks the added key from most queries."""
    call = Call({extra: True}, cross=False)
    dense = call.dense()
    x = call.inputs()
    settings = {"attn_mask": causal_mask(), "need_weights": False}
    assert_same(full(dense)(*x, **settings, is_causal=True), dense(*x, **settings))


def test_the_causal_hint_without_a_mask_is_refused_as_by_torch():
    call = Call({}, cross=False)
    dense, x = call.dense(), call.inputs()
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        dense(*x, is_causal=True)
    with pytest.raises(lr.LowRankError, match="attn_mask"):
        full(dense)(*x, is_causal=True)


@few
def test_small_rank_computes_what_its_dense_form_computes(call):
    layer = small(call)
    dense = layer.to_dense()
    x = call.inputs()
    for mask in masks(call):
        assert_same(layer(*x, **mask), dense(*x, **mask))
    assert relative(dense(*x)[0], call.dense()(*x)[0]) > 0.05


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
@few
def test_half_precision(call, dtype):
    dense = call.dense(dtype=dtype)
    layer = full(dense)
    x = call.inputs(dtype)
    exact = copy.deepcopy(dense).double()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for mask in (
        {},
        {"attn_mask": attention_masks(call, dtype)["float"]},
        {"attn_mask": attention_masks(call)["bool"]},
    ):
        for weights in (True, False):
            out, scores = layer(*x, **mask, need_weights=weights)
            wide = {k: m.double() if m.is_floating_point() else m for k, m in mask.items()}
            expected = exact(*(each.double() for each in x), **wide)
            assert out.dtype == dtype
            assert relative(out, expected[0]) < 2 * HALF_TOLERANCE[dtype]
            assert scores is None or relative(scores, expected[1]) < 2 * HALF_TOLERANCE[dtype]


def test_autocast_gives_the_dtype_that_torch_gives():
    call = Call({"batch_first": True}, cross=False)
    dense = call.dense()
    layer = full(dense)
    x = call.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = layer(*x)[0], dense(*x)[0]
    assert got.dtype == expected.dtype
    assert relative(got, dense(*x)[0]) < 5e-2


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_dropout_drops_attention_weights_in_training_only(weights):
    call = Call({"batch_first": True}, cross=False)
    dense = call.dense(dropout=0.4)
    layer = full(dense)
    assert layer.dropout == 0.4
    x = call.inputs()
    layer.eval()
    quiet = layer(*x, need_weights=weights)[0]
    assert torch.equal(layer(*x, need_weights=weights)[0], quiet)
    layer.train()
    many = [each.repeat(4000, 1, 1) for each in x]  # every sample of a batch draws its own mask
    drawn = layer(*many, need_weights=weights)[0].detach().unflatten(0, (4000, -1))
    assert not torch.equal(drawn[0], drawn[1])
    assert relative(drawn.mean(0), quiet) < 0.05  # the mean is kept, since what follows is linear
    dense.train()
    torchs = dense(*many, need_weights=weights)[0].detach().unflatten(0, (4000, -1))
    assert relative(drawn.var(0), torchs.var(0)) < 0.1


def test_dropout_drops_that_fraction_of_the_weights():
    call = Call({}, cross=False)
    layer = full(call.dense(dropout=0.25)).train()
    x = call.inputs()
    undropped = layer.eval()(*x, average_attn_weights=False)[1].detach()
    layer.train()
    drawn = torch.stack([layer(*x, average_attn_weights=False)[1].detach() for _ in range(300)])
    kept = drawn != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(drawn[kept], (undropped / 0.75).expand_as(drawn)[kept], rtol=1e-5)


def test_dropout_of_zero_is_none():
    layer = full(Call({}).dense()).train()
    x = Call({}).inputs()
    assert torch.equal(layer(*x)[0], layer(*x)[0])
