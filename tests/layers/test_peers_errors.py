"""Where other libraries raise errors, each case by its name."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from ..contracts.tables import relative
from .peers import CONVS, TIGHT, convs, full, peer_conv, peer_warnings, tensorly_torch

pytestmark = peer_warnings


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
    embedding = nn.Embedding(17, 7)
    assert relative(full(lr.LowRankEmbedding, embedding)(torch.arange(17)), embedding.weight) < TIGHT
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
@pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
)  # by torch's exporter
def test_onnx_export_fails(cls):
    """Users of the peers ask for it (tensorly/torch #11, #33)."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer = cls.from_dense(nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1, padding_mode="reflect"), rank=2).eval()
    x = torch.randn(2, 3, 7, 7)
    program = torch.onnx.export(
        layer, (torch.randn(3, 3, 7, 7),), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(torch.from_numpy(got), layer(x)) < 1e-4
