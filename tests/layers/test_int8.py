"""Layers in int8: the rounding, what torch does with modules, and the kernel."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.layers import bits_of, round_factors_
from lowrank_layers.layers.int8_layer import quantize_rows

from ..contracts.tables import HALF_TOLERANCE, relative

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> lr.Int8Linear:
    return lr.Int8Linear.from_dense(nn.Linear(64, 24, bias=bias, dtype=dtype))


def pairs() -> list[lr.FactoredModule]:
    return [
        lr.LowRankLinear(24, 16, rank=5),
        lr.PivotLinear(24, 16, rank=5),
        lr.PivotLinear(24, 24, rank=24),
        lr.LowRankEmbedding(50, 16, 3, rank=5),
    ]


def inputs_of(layer: nn.Module) -> torch.Tensor:
    return torch.randint(50, (4, 3)) if isinstance(layer, lr.LowRankEmbedding) else torch.randn(4, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_times_scales_are_within_half_a_scale(dtype):
    weight = torch.randn(30, 17, dtype=torch.float64).mul(torch.logspace(-6, 4, 30).double()[:, None]).to(dtype)
    weight[3] = 0
    codes, scale = quantize_rows(weight)
    assert (codes.dtype, scale.dtype, scale[3]) == (torch.int8, torch.float32, 0)
    error = (codes.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    assert (codes.abs().amax(1)[scale > 0] == 127).all()


def test_a_row_without_entries_and_a_tiny_one_are_zero():
    assert quantize_rows(torch.empty(3, 0))[1].tolist() == [0, 0, 0]
    codes, scale = quantize_rows(torch.full((2, 4), 1e-45))
    assert not (codes * scale[:, None]).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_a_linear_layer_is_its_dense_twin(dtype, rows):
    layer = linear(dtype)
    x = torch.randn(rows, 64, dtype=dtype)
    expected = layer.to_dense().double()(x.double())
    assert relative(layer(x), expected) < HALF_TOLERANCE.get(dtype, 1e-6)
    assert torch.equal(layer.to_dense().weight, layer.weight)
    assert layer(x.reshape(rows, 1, 64)).shape == (rows, 1, 24)
    assert layer(x[:0]).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_runs_where_it_may_and_agrees(dtype, monkeypatch):
    calls: list[int] = []
    kernel = torch._weight_int8pack_mm

    def counted(*args):
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    layer, x = linear(dtype), torch.randn(5, 64, dtype=dtype)
    outputs = layer(x)
    assert len(calls) == 1
    assert relative(outputs, nn.functional.linear(x, layer.weight, layer.bias)) < HALF_TOLERANCE[dtype]
    layer(x.requires_grad_()).sum().backward()
    torch.func.vmap(layer)(x.detach())
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.detach())
    layer(torch.randn(100, 64, dtype=dtype))
    lr.Int8Linear(40, 8, dtype=dtype)(torch.randn(2, 40, dtype=dtype))  # it would read past the end of a row
    linear()(torch.randn(2, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("moved", ["codes", "input"])
def test_tensors_that_lie_anywhere_in_memory(moved):
    """As those of a file that is mapped; the kernel would end the process."""
    layer, x = linear(torch.bfloat16), torch.randn(5, 64).bfloat16()
    expected = layer(x)
    if moved == "codes":
        layer.codes = torch.cat([layer.codes.new_zeros(1), layer.codes.flatten()])[1:].view_as(layer.codes)
    else:
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert torch.equal(layer(x), expected)


def test_an_embedding_looks_rows_up():
    dense = nn.Embedding(50, 16, padding_idx=3)
    layer = lr.Int8Embedding.from_dense(dense)
    tokens = torch.randint(50, (4, 7))
    assert torch.equal(layer(tokens), nn.functional.embedding(tokens, layer.weight))
    assert not layer(torch.tensor(3)).any()
    assert (layer.padding_idx, layer.to_dense().padding_idx) == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_pass_to_the_inputs_and_the_bias(dtype):
    layer = linear(dtype)
    twin = layer.to_dense()
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    twin(other).square().sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(layer.bias.grad, twin.bias.grad)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_scales_stay_in_fp32_through_casts():
    layer = linear()
    scale = layer.scale.clone()
    for cast in (layer.half, layer.bfloat16, layer.float, layer.double, lambda: layer.to(torch.bfloat16)):
        cast()
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.scale, scale)
    assert (layer.codes.dtype, layer.weight.dtype, layer.bias.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [linear(), lr.Int8Embedding(50, 16), *map(round_factors_, pairs())], ids=repr)
def test_copies_and_files_hold_the_same(layer):
    tokens = isinstance(layer, (lr.Int8Embedding, lr.LowRankEmbedding))
    x = torch.randint(50, (4, 3)) if tokens else torch.randn(4, layer.in_features)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    blank = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    blank.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), blank]
    assert all(torch.equal(each(x), layer(x)) for each in copies)
    with torch.device("meta"):
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == layer(x).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_and_exports_with_a_dynamic_batch(dtype):
    model = nn.Sequential(linear(dtype), nn.ReLU(), round_factors_(lr.PivotLinear(24, 16, rank=5, dtype=dtype)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (torch.randn(4, 64, dtype=dtype),), dynamic_shapes=({0: batch},)).module()
    for rows in (2, 90):
        x = torch.randn(rows, 64, dtype=dtype)
        for each in (compiled, exported):
            assert relative(each(x), model(x)) < HALF_TOLERANCE.get(dtype, 1e-6)


@pytest.mark.parametrize("layer", pairs(), ids=repr)
def test_factors_are_rounded_and_multiplied_out(layer):
    exact = copy.deepcopy(layer)
    assert bits_of(layer) is None
    assert round_factors_(layer) is layer
    assert bits_of(layer) == 8
    x = inputs_of(layer)
    for part, other in zip(layer.parts, exact.parts, strict=True):
        assert torch.equal(part.weight, other.weight) or (part.weight - other.weight).abs().max() <= part.scale.max()
    assert torch.allclose(layer(x), layer.to_dense()(x), atol=1e-5)
    assert relative(layer(x), exact(x)) < 0.03
    assert layer.to_dense().weight.requires_grad
    cost, before = lr.layer_cost(layer), lr.layer_cost(exact)
    assert cost.params == before.params
    assert cost.bytes == sum(t.numel() * t.element_size() for t in layer.state_dict().values()) < before.bytes


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(lr.LowRankError, match="LowRankConv2d"):
        round_factors_(lr.LowRankConv2d(4, 4, 3, rank=2))
    with pytest.raises(lr.LowRankError, match="max_norm"):
        round_factors_(lr.LowRankEmbedding(9, 4, max_norm=1.0, rank=2))
    with pytest.raises(lr.UnsupportedLayerError, match="max_norm"):
        lr.Int8Embedding.from_dense(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(lr.UnsupportedLayerError, match="Conv1d"):
        lr.Int8Linear.from_dense(nn.Conv1d(4, 4, 1))
    bad = nn.Linear(3, 3)
    bad.weight.data[0, 0] = torch.nan
    with pytest.raises(lr.LowRankError, match="NaN"):
        lr.Int8Linear.from_dense(bad)


def test_nobody_writes_to_the_weight():
    layer = linear()
    with pytest.raises(lr.LowRankError, match="int8 codes"):
        layer.weight = nn.Parameter(torch.zeros(24, 64))
    with pytest.raises(lr.LowRankError, match="int8 codes"):
        layer.weight.data.zero_()
    with pytest.raises(lr.LowRankError, match="scripted"):
        torch.jit.script(layer)


def test_attributes_mode_and_bias_come_back():
    dense = nn.Linear(64, 24).eval()
    dense.note = "kept"
    dense.bias.requires_grad_(False)
    layer = lr.Int8Linear.from_dense(dense)
    back = layer.to_dense()
    assert not layer.training
    assert not back.training
    assert (layer.note, back.note) == ("kept", "kept")
    assert not layer.bias.requires_grad
    assert not back.bias.requires_grad
    assert back.weight.requires_grad
    assert torch.equal(back.bias, dense.bias)
    assert back.bias is not dense.bias
