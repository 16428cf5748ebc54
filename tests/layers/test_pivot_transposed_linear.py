"""``PivotTransposedLinear``, the pivot form in the place of transformers' ``Conv1D``."""

import copy

import pytest
import torch

import lowrank_layers as lr

from ..contracts.tables import HALF_TOLERANCE, relative
from .test_transposed_linear import conv1d, gpt2, logits, tokens


@pytest.mark.parametrize(("into", "out"), [(7, 10), (10, 7), (13, 11), (5, 1)])
def test_full_rank_computes_what_conv1d_computes(into, out):
    dense = conv1d(into, out)
    layer = lr.PivotTransposedLinear.from_dense(dense, rank=1000)
    x = torch.randn(2, 3, into)
    assert layer.rank == min(into, out)
    assert relative(layer(x), dense(x)) < 1e-5
    assert relative(layer.weight, dense.weight) < 1e-5
    assert relative(layer.factors().to_dense(), dense.weight) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_is_the_map_of_the_pair(rank):
    dense = conv1d(dtype=torch.float64)
    pair = lr.LowRankTransposedLinear.from_dense(dense, rank=rank)
    x = torch.randn(4, 7, dtype=torch.float64)
    for pivot in (lr.PivotTransposedLinear.of_pair(pair), lr.PivotTransposedLinear.from_dense(dense, rank=rank)):
        assert type(pivot) is lr.PivotTransposedLinear
        assert relative(pivot(x), pair(x)) < 1e-12
        assert relative(pivot.to_dense()(x), pair(x)) < 1e-12
        assert type(pivot.to_pair()) is lr.LowRankTransposedLinear
        assert relative(pivot.to_pair()(x), pair(x)) < 1e-12
        assert sum(p.numel() for p in pair.parameters()) - rank**2 == sum(p.numel() for p in pivot.parameters())


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(dtype):
    dense = conv1d(dtype=dtype)
    layer = lr.PivotTransposedLinear.from_dense(dense, rank=1000)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert relative(layer.weight, dense.weight) < HALF_TOLERANCE[dtype]


def test_plans_choose_it_for_gpt2(tmp_path):
    model = gpt2()
    plan = lr.make_plan(model, lr.Budget(params=0.7))
    small = lr.factorize_(copy.deepcopy(model), plan)
    chosen = {type(module) for module in small.modules() if isinstance(module, lr.LowRankTransposedLinear)}
    assert chosen == {lr.PivotTransposedLinear}
    lr.save(small, tmp_path / "small.safetensors")
    loaded = lr.load(tmp_path / "small.safetensors", into=gpt2())
    assert torch.equal(logits(loaded, tokens()), logits(small, tokens()))
    lr.add_lora_(small, "all-linear", rank=2)
    assert relative(logits(small, tokens()), logits(loaded, tokens())) < 1e-5
    dense = lr.densify_(loaded)
    assert not any(isinstance(module, lr.FactoredModule) for module in dense.modules())
