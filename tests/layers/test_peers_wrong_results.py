"""What other libraries get silently wrong, each case by its name (tensorly-torch 0.5, fasterai, composer, ...)."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from ..contracts.tables import relative
from .peers import CONVS, TIGHT, convs, full, peer_conv, peer_warnings, tensorly_torch

pytestmark = peer_warnings


def test_rank_30_on_5x4x3x3_returns_16x_the_kernel():
    """A rank above the dimension scales the reconstruction: rank=30 on 5x4x3x3 gives the kernel times 16."""
    kernel = torch.randn(5, 4, 3, 3)
    for f in (lr.tucker(kernel, (30, 30, 30, 30)), lr.tucker(kernel, (30, 30, None, None)), lr.cp(kernel, 36)):
        dense = f.to_dense()
        assert relative(dense, kernel) < TIGHT
        assert float((dense * kernel).sum() / kernel.square().sum()) == pytest.approx(1, rel=TIGHT)
    assert lr.tucker(kernel, (30, 30, 30, 30)).rank == (5, 4, 3, 3)
    assert relative(lr.svd(kernel.flatten(1), 30).to_dense(), kernel.flatten(1)) < TIGHT
    if tltorch := tensorly_torch():
        theirs = tltorch.FactorizedTensor.from_tensor(kernel, rank=30, factorization="tucker").to_tensor().detach()
        assert float((theirs * kernel).sum() / kernel.square().sum()) == pytest.approx(16, rel=1e-4)


@convs
def test_rank_above_the_dimension_scales_the_output(cls):
    """A rank above the dimension multiplies what the layer computes."""
    conv = nn.Conv2d(4, 5, 3)
    x = torch.randn(2, 4, 7, 7)
    assert relative(cls.from_dense(conv, rank=30 if cls is not lr.CPConv2d else 300)(x), conv(x)) < TIGHT
    if cls is lr.TuckerConv2d and (tltorch := tensorly_torch()):
        assert relative(peer_conv(tltorch, conv, rank=30)(x), conv(x)) > 10


def test_a_fractional_tucker_rank_crushes_the_spatial_modes():
    """A tenth of every mode makes 3x3 into 1x1: error 0.881 where 0.132 was to be had at the same size."""
    core, out, into = torch.randn(12, 12, 3, 3), torch.randn(64, 12), torch.randn(64, 12)
    kernel = torch.einsum("abhw,oa,ib->oihw", core, out, into)
    noise = torch.randn_like(kernel)
    conv = nn.Conv2d(64, 64, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(kernel + 0.1 * noise * kernel.norm() / noise.norm())
    layer = lr.TuckerConv2d.from_dense(conv, rank=lr.ParameterFraction(0.1))
    assert layer.core.kernel_size == (3, 3)
    assert sum(p.numel() for p in layer.parameters()) <= 0.1 * conv.weight.numel()
    assert layer.factors().relative_error(conv.weight) < 0.11
    assert lr.tucker(conv.weight, (43, 43, 1, 1)).relative_error(conv.weight) > 0.8
    if tltorch := tensorly_torch():
        weight = conv.weight.detach()
        theirs = tltorch.FactorizedTensor.from_tensor(weight, rank=0.1, factorization="tucker")
        assert tuple(theirs.rank)[2:] == (1, 1)
        assert relative(theirs.to_tensor(), weight) > 0.8


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_invents_a_bias(bias):
    """A layer without a bias comes back with a random one."""
    linear = nn.Linear(8, 6, bias=bias)
    layer = full(lr.LowRankLinear, linear)
    assert [name for name, _ in layer.named_parameters() if "bias" in name] == (["up.bias"] if bias else [])
    assert (layer.to_dense().bias is not None) == bias
    if bias:
        assert torch.equal(layer.up.bias, linear.bias)
    else:
        assert torch.equal(layer(torch.zeros(3, 8)), torch.zeros(3, 6))
        if tltorch := tensorly_torch():
            theirs = tltorch.FactorizedLinear.from_linear(linear, rank=4)
            assert bool(theirs.bias.detach().any())
            assert bool(theirs(torch.zeros(3, 8)).detach().any())


@convs
@pytest.mark.parametrize("bias", [True, False])
def test_from_conv_invents_a_bias(cls, bias):
    """The same for convolutions."""
    conv = nn.Conv2d(3, 4, 3, bias=bias)
    layer = full(cls, conv)
    assert sum("bias" in name for name, _ in layer.named_parameters()) == bias
    assert (layer.to_dense().bias is not None) == bias
    if not bias:
        assert not bool(layer(torch.zeros(1, 3, 5, 5)).any())


@convs
def test_stride_2_1_becomes_2_2(cls):
    """Only stride[0] is kept."""
    conv = nn.Conv2d(3, 4, 3, stride=(2, 1))
    layer = full(cls, conv)
    x = torch.randn(2, 3, 9, 9)
    assert layer.stride == layer.to_dense().stride == (2, 1)
    assert layer(x).shape == (2, 4, 4, 7)
    assert relative(layer(x), conv(x)) < TIGHT
    assert cls(3, 4, 3, stride=(1, 2), rank=2)(x).shape == (2, 4, 7, 4)
    if tltorch := tensorly_torch():
        assert peer_conv(tltorch, conv).stride.tolist() == [2, 2]
        assert peer_conv(tltorch, conv)(x).shape == (2, 4, 4, 4)


@convs
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_is_ignored(cls, mode):
    """Every padding is zeros: 31 % output error at full rank with padding_mode='reflect'."""
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    layer = full(cls, conv)
    x = torch.randn(2, 3, 5, 5)
    assert layer.padding_mode == layer.to_dense().padding_mode == mode
    assert relative(layer(x), conv(x)) < TIGHT
    zeros = nn.Conv2d(3, 4, 3, padding=1)
    zeros.load_state_dict(conv.state_dict())
    assert relative(zeros(x), conv(x)) > 0.05  # else this test could not tell
    if tltorch := tensorly_torch():
        assert relative(peer_conv(tltorch, conv)(x), zeros(x)) < TIGHT


def test_embedding_loses_padding_idx():
    """The factored embedding has no padding row: it is looked up as any other, and learns."""
    embedding = nn.Embedding(20, 8, padding_idx=3)
    for layer in (lr.LowRankEmbedding.from_dense(embedding, rank=4), lr.LowRankEmbedding(20, 8, padding_idx=3, rank=4)):
        assert layer.padding_idx == layer.to_dense().padding_idx == 3
        assert torch.equal(layer(torch.tensor([3, 3])), torch.zeros(2, 8))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        (layer(torch.arange(20)) - 1).square().sum().backward()
        assert not bool(layer.down.weight.grad[3].any())
        assert bool(layer.down.weight.grad[4].any())
        optimizer.step()
        assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, 8))
    if tltorch := tensorly_torch():
        theirs = tltorch.FactorizedEmbedding.from_embedding(embedding, rank=2)
        assert not hasattr(theirs, "padding_idx")
        theirs(torch.tensor([3, 4])).sum().backward()
        before = theirs(torch.tensor([3])).detach()
        torch.optim.SGD(theirs.parameters(), lr=0.1).step()
        assert not torch.equal(theirs(torch.tensor([3])), before)


def test_embedding_with_a_padding_row_that_is_not_zero_keeps_it():
    """torch lets a padding row hold anything (from_pretrained): it is looked up, and gets no gradient."""
    embedding = nn.Embedding.from_pretrained(torch.randn(9, 5), freeze=False, padding_idx=2)
    layer = full(lr.LowRankEmbedding, embedding)
    assert relative(layer(torch.arange(9)), embedding.weight) < TIGHT
    layer(torch.tensor([2, 2])).sum().backward()
    assert not bool(layer.down.weight.grad.any())


def test_constructors_leave_torch_empty_weights():
    """Fresh layers hold whatever memory held: NaN, zeros, 1e38."""
    poison = [torch.full((n,), float("nan")) for n in (8, 16, 24, 32, 64, 128, 256, 4096)]
    del poison
    makers = [
        lambda: lr.LowRankLinear(8, 8, rank=4),
        lambda: lr.LowRankConv2d(4, 8, 3, rank=4),
        lambda: lr.TuckerConv2d(4, 8, 3, rank=(4, 2)),
        lambda: lr.CPConv2d(4, 8, 3, rank=4),
        lambda: lr.LowRankEmbedding(8, 8, rank=4),
    ]
    for make in makers:
        torch.manual_seed(1)
        first = make()
        torch.manual_seed(1)
        second = make()
        for name, parameter in first.named_parameters():
            assert bool(parameter.isfinite().all()), name
            assert float(parameter.detach().std()) > 1e-3, name
            assert float(parameter.detach().abs().max()) < 10, name
            assert torch.equal(parameter, second.get_parameter(name)), name
    if tltorch := tensorly_torch():
        before = torch.get_rng_state()
        theirs = tltorch.FactorizedConv(4, 8, 3, order=2, rank=4, factorization="tucker", bias=True)
        assert len(list(theirs.parameters())) == 6
        assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn


@pytest.mark.parametrize("cls", [lr.LowRankLinear, *CONVS], ids=lambda cls: cls.__name__)
def test_the_converted_bias_shares_storage(cls):
    """Training the factored layer moves the bias of the layer it came from."""
    dense = nn.Linear(6, 5) if cls is lr.LowRankLinear else nn.Conv2d(3, 4, 3)
    layer = full(cls, dense)
    before = dense.bias.detach().clone()
    assert torch.equal(layer.last.bias, before)
    with torch.no_grad():
        layer.last.bias.add_(1)
    assert torch.equal(dense.bias, before)
    back = layer.to_dense()
    with torch.no_grad():
        back.bias.zero_()
    assert torch.equal(layer.last.bias, before + 1)
    if cls is lr.TuckerConv2d and (tltorch := tensorly_torch()):
        assert peer_conv(tltorch, dense).bias.data_ptr() == dense.bias.data_ptr()


def test_from_linear_throws_the_trained_weights_away():
    """The conversion ends in reset_parameters()."""
    linear = nn.Linear(8, 6)
    x = torch.randn(3, 8)
    assert relative(full(lr.LowRankLinear, linear)(x), linear(x)) < TIGHT


def test_cp_conversion_is_noise():
    """A converted layer has nothing of the trained kernel: error 0.99."""
    factors = [torch.linalg.qr(torch.randn(n, 3)).Q for n in (8, 6, 3, 3)]
    conv = nn.Conv2d(6, 8, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("r,or,ir,hr,wr->oihw", torch.tensor([3.0, 2.0, 1.0]), *factors))
    assert lr.CPConv2d.from_dense(conv, rank=3).factors().relative_error(conv.weight) < 1e-2


def test_a_compressed_layer_is_larger_than_the_dense_one():
    """A fraction of 0.3 "removed" grew 8,320 parameters to 11,392."""
    linear = nn.Linear(64, 128)
    layer = lr.LowRankLinear.from_dense(linear, rank=lr.ParameterFraction(0.7))
    assert sum(p.numel() for p in layer.parameters()) < sum(p.numel() for p in linear.parameters())
