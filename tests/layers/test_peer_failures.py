"""What other libraries get wrong, each case by its name (measured on tensorly-torch 0.5, fasterai, composer, ...).

Where tensorly-torch is installed, its own answer stands beside ours, so that what is said about it is checked.
"""

import ast
import copy
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_layers as lr

CONVS = [lr.LowRankConv2d, lr.TuckerConv2d, lr.CPConv2d]
convs = pytest.mark.parametrize("cls", CONVS, ids=lambda cls: cls.__name__)

pytestmark = pytest.mark.filterwarnings(
    "ignore:Given only one int for 'rank'", "ignore:Trying to compute SVD with n_eigenvecs"
)

MORE = 10_000
"""Above every rank that the layers of this file have."""

TIGHT = 1e-5


def full(cls: type[lr.FactoredModule], dense: nn.Module) -> lr.FactoredModule:
    return cls.from_dense(dense, rank=MORE)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def tensorly_torch() -> ModuleType | None:
    """The peer, where it and tensorly, which it does not declare, are installed."""
    if not all(importlib.util.find_spec(name) for name in ("tensorly", "tltorch")):
        return None
    return importlib.import_module("tltorch")


def peer_conv(tltorch: ModuleType, conv: nn.Module, **kwargs) -> nn.Module:
    """Its conversion at full Tucker rank, unless told."""
    settings = {"factorization": "tucker", "rank": tuple(conv.weight.shape), **kwargs}
    return tltorch.FactorizedConv.from_conv(conv, **settings)


# -------------------------------------------------------------------------------------------- silent wrong results


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
    """The factored table has no padding row: it is looked up as any other, and learns."""
    table = nn.Embedding(20, 8, padding_idx=3)
    for layer in (lr.LowRankEmbedding.from_dense(table, rank=4), lr.LowRankEmbedding(20, 8, padding_idx=3, rank=4)):
        assert layer.padding_idx == layer.to_dense().padding_idx == 3
        assert torch.equal(layer(torch.tensor([3, 3])), torch.zeros(2, 8))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        (layer(torch.arange(20)) - 1).square().sum().backward()
        assert not bool(layer.down.weight.grad[3].any())
        assert bool(layer.down.weight.grad[4].any())
        optimizer.step()
        assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, 8))
    if tltorch := tensorly_torch():
        theirs = tltorch.FactorizedEmbedding.from_embedding(table, rank=2)
        assert not hasattr(theirs, "padding_idx")
        theirs(torch.tensor([3, 4])).sum().backward()
        before = theirs(torch.tensor([3])).detach()
        torch.optim.SGD(theirs.parameters(), lr=0.1).step()
        assert not torch.equal(theirs(torch.tensor([3])), before)


def test_embedding_with_a_padding_row_that_is_not_zero_keeps_it():
    """torch lets a padding row hold anything (from_pretrained): it is looked up, and gets no gradient."""
    table = nn.Embedding.from_pretrained(torch.randn(9, 5), freeze=False, padding_idx=2)
    layer = full(lr.LowRankEmbedding, table)
    assert relative(layer(torch.arange(9)), table.weight) < TIGHT
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


# ------------------------------------------------------------------------------------------------- errors elsewhere


@convs
def test_groups_are_ignored_or_crash(cls):
    """groups > 1 crashes somewhere inside, or is dropped; here every group is factorized on its own."""
    x = torch.randn(2, 4, 7, 7)
    for conv in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4)):
        layer = full(cls, conv)
        assert layer.groups == layer.to_dense().groups == conv.groups
        assert relative(layer(x), conv(x)) < TIGHT
        if tltorch := tensorly_torch():
            with pytest.raises(RuntimeError, match="groups=1"):
                peer_conv(tltorch, conv)(x)


@pytest.mark.parametrize("family", ["LowRank", "Tucker", "CP"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_crash(family, dims):
    """No library factorizes them: an error, or a layer that is not transposed."""
    cls = getattr(lr, f"{family}ConvTranspose{dims}d")
    conv = cls.dense_type(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    layer = full(cls, conv)
    x = torch.randn(2, 4, *[5] * dims)
    assert layer(x).shape == conv(x).shape == (2, 6, *[10] * dims)
    assert relative(layer(x), conv(x)) < TIGHT
    ambiguous = cls.dense_type(4, 6, 3, stride=2)
    for size in ([11] * dims, [12] * dims):
        assert relative(full(cls, ambiguous)(x, output_size=size), ambiguous(x, output_size=size)) < TIGHT
    if tltorch := tensorly_torch():
        with pytest.raises(RuntimeError, match="channels"):
            peer_conv(tltorch, ambiguous)(x)


@convs
@pytest.mark.parametrize("kernel", [3, 4, (2, 5)], ids=str)
def test_padding_same_crashes(cls, kernel):
    """padding='same' is not understood."""
    conv = nn.Conv2d(3, 4, kernel, padding="same", dilation=2)
    layer = full(cls, conv)
    x = torch.randn(2, 3, 12, 11)
    assert layer.to_dense().padding == "same"
    assert layer(x).shape == (2, 4, 12, 11)
    assert relative(layer(x), conv(x)) < TIGHT
    if tltorch := tensorly_torch():
        with pytest.raises(AssertionError):
            peer_conv(tltorch, conv)


@convs
def test_unbatched_input_crashes(cls):
    """[C, H, W], which nn.Conv2d takes, is refused."""
    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 7, 7)
    assert relative(full(cls, conv)(x), conv(x)) < TIGHT
    if cls is lr.TuckerConv2d and (tltorch := tensorly_torch()):
        with pytest.raises(RuntimeError, match="channels"):
            peer_conv(tltorch, conv, implementation="factorized")(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_crashes(dtype):
    """linalg_svd has no half: a bf16 or fp16 source is an error."""
    for cls in (lr.LowRankLinear, *CONVS, lr.LowRankEmbedding):
        sizes = {nn.Linear: (6, 5), nn.Conv2d: (3, 4, 3), nn.Embedding: (9, 6)}[cls.dense_type]
        dense = cls.dense_type(*sizes, dtype=dtype)
        layer = full(cls, dense)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert relative(layer.to_dense().weight, dense.weight) < 3e-2
        small = cls.from_dense(dense, rank=2)
        assert small.to_dense().weight.dtype == dtype
        assert small.factors().to_dense().dtype == dtype
    if tltorch := tensorly_torch():
        with pytest.raises(NotImplementedError, match="linalg_svd"):
            peer_conv(tltorch, nn.Conv2d(3, 4, 3, dtype=dtype))
        with pytest.raises(NotImplementedError, match="linalg_svd"):
            tltorch.FactorizedLinear.from_linear(nn.Linear(8, 6, dtype=dtype), rank=4, factorization="blocktt")


def test_prime_sizes_crash():
    """Sizes that do not split into factors are refused, or come back as large as they were."""
    linear, x = nn.Linear(13, 11), torch.randn(3, 13)
    assert relative(full(lr.LowRankLinear, linear)(x), linear(x)) < TIGHT
    table = nn.Embedding(17, 7)
    assert relative(full(lr.LowRankEmbedding, table)(torch.arange(17)), table.weight) < TIGHT
    conv, image = nn.Conv2d(7, 11, 3), torch.randn(2, 7, 5, 5)
    for cls in CONVS:
        assert relative(full(cls, conv)(image), conv(image)) < TIGHT
    size = sum(p.numel() for p in linear.parameters())
    assert sum(p.numel() for p in lr.LowRankLinear.from_dense(linear, rank=2).parameters()) < size
    if tltorch := tensorly_torch():
        # one prime is one mode: the tensor train has a single core, the dense matrix, whatever the rank
        theirs = tltorch.FactorizedLinear.from_linear(linear, rank=2, factorization="blocktt")
        assert sum(p.numel() for p in theirs.parameters()) == size


def test_three_dimensional_input_of_a_linear_layer_crashes():
    """[batch, time, features] is refused."""
    linear, x = nn.Linear(8, 6), torch.randn(2, 5, 8)
    assert relative(full(lr.LowRankLinear, linear)(x), linear(x)) < TIGHT


@pytest.mark.parametrize("family", ["LowRank", "Tucker", "CP"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_compile_fullgraph_fails_on_all_convolutions(family, dims):
    """Settings kept as numpy arrays cannot be guarded on: no convolution compiles into one graph."""
    torch._dynamo.reset()
    cls = getattr(lr, f"{family}Conv{dims}d")
    layer = cls.from_dense(cls.dense_type(4, 6, 3, stride=2, padding=1), rank=2)
    x = torch.randn(2, 4, *[7] * dims)
    assert relative(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < TIGHT


@pytest.mark.parametrize("factorization", ["cp", "tucker", "tt"])
@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
def test_compile_fullgraph_fails_on_the_peers_convolutions(factorization, implementation):
    """All of tensorly-torch's: see above for ours."""
    tltorch = tensorly_torch()
    if tltorch is None:
        pytest.skip("tensorly-torch is not installed")
    torch._dynamo.reset()
    settings = {"rank": 2, "factorization": factorization, "implementation": implementation}
    theirs = tltorch.FactorizedConv.from_conv(nn.Conv2d(4, 5, 3), **settings)
    with pytest.raises(Exception, match=r"data-dependent|numpy|torch\._dynamo"):
        torch.compile(theirs, fullgraph=True, backend="eager")(torch.randn(2, 4, 7, 7))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_with_a_dynamic_batch_fails_on_the_linear_layer(strict):
    """tensorly-torch's, strictly: 'SymIntArrayRef expected to contain only concrete integers'."""
    linear = nn.Linear(64, 32)
    batch = ({0: torch.export.Dim("batch")},)
    x = torch.randn(3, 64), torch.randn(5, 64)
    layer = lr.LowRankLinear.from_dense(linear, rank=4)
    program = torch.export.export(layer, x[:1], dynamic_shapes=batch, strict=strict)
    assert relative(program.module()(x[1]), layer(x[1])) < TIGHT


@convs
def test_onnx_export_fails(cls):
    """Users of the peers ask for it (tensorly/torch #11, #33)."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = cls.from_dense(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1, padding_mode="reflect"), rank=2).eval()
    x = torch.randn(2, 3, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            layer,
            (torch.randn(3, 3, 7, 7),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(torch.from_numpy(got), layer(x)) < 1e-4


# ----------------------------------------------------------------------------------------------------- whole models


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
    # kv_cache/transformers is imported when LowRankCache is looked up: an extra, and its own error names it
    for path in (p for p in folder.rglob("*.py") if "transformers" not in p.relative_to(folder).parts):
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
