"""``LowRankMultiheadAttention`` from and to ``nn.MultiheadAttention``: settings, flags, ranks, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowrank_layers as lr

from ..contracts.tables import BAD_RANKS, relative
from .attention_calls import (
    EMBED,
    FEW,
    HEADS,
    KDIM,
    MORE,
    PROJECTIONS,
    TIGHT,
    VDIM,
    Attention,
    Call,
    calls,
    few,
    full,
    small,
)


@calls
def test_settings_survive_the_way_there_and_back(call):
    dense = call.dense(dropout=0.3)
    layer = full(dense)
    back = layer.to_dense()
    assert type(back) is nn.MultiheadAttention
    names = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")
    for name in names:
        assert getattr(layer, name) == getattr(back, name) == getattr(dense, name), name
    assert back._qkv_same_embed_dim == dense._qkv_same_embed_dim
    assert dense.state_dict().keys() == back.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert relative(back.state_dict()[name], tensor) < TIGHT, name


@few
@pytest.mark.parametrize("rank", [None, 2, (2, None, 3, None)], ids=str)
def test_nothing_is_shared_with_the_source(call, rank):
    dense = call.dense()
    layer = Attention.from_dense(dense, rank=rank)
    back = layer.to_dense()
    storages = [{p.untyped_storage().data_ptr() for p in module.parameters()} for module in (dense, layer, back)]
    assert not storages[0] & storages[1]
    assert not storages[1] & storages[2]
    assert len(storages[1]) == len(list(layer.parameters()))
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_is_kept(training):
    layer = small(Call({}))
    dense = Call({}).dense().train(training)
    layer = Attention.from_dense(dense, rank=(2, None, 2, None))
    assert {module.training for module in layer.modules()} == {training}
    assert {module.training for module in layer.to_dense().modules()} == {training}


FLAGS = {
    "all learn": [],
    "frozen": ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "bias_k", "bias_v"],
    "only biases learn": ["in_proj_weight", "out_proj.weight"],
    "only weights learn": ["in_proj_bias", "out_proj.bias", "bias_k", "bias_v"],
    "only the output learns": ["in_proj_weight", "in_proj_bias", "bias_k", "bias_v"],
    "only the input learns": ["out_proj.weight", "out_proj.bias"],
}


@pytest.mark.parametrize("frozen", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("rank", [None, 2], ids=str)
def test_gradient_flags_are_kept(frozen, rank):
    dense = Call({"add_bias_kv": True}).dense()
    for name in frozen:
        dense.get_parameter(name).requires_grad_(False)
    layer = Attention.from_dense(dense, rank=rank)
    for name, parameter in layer.named_parameters():
        part, kind = name.split(".")[0], name.split(".")[-1]
        source = part if part in ("bias_k", "bias_v") else f"{'out_proj.' if part == 'out_proj' else 'in_proj_'}{kind}"
        assert parameter.requires_grad == dense.get_parameter(source).requires_grad, name
        assert parameter.is_leaf


@pytest.mark.parametrize("frozen", FLAGS.values(), ids=FLAGS)
def test_gradient_flags_survive_the_way_there_and_back(frozen):
    dense = Call({"add_bias_kv": True}).dense()
    for name in frozen:
        dense.get_parameter(name).requires_grad_(False)
    back = Attention.from_dense(dense, rank=2).to_dense()
    flags = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == flags


@pytest.mark.parametrize("name", PROJECTIONS[:3])
def test_projections_of_their_own_width_keep_their_own_flags(name):
    dense = Call({}, separate=True).dense()
    dense.get_parameter(f"{name}_weight").requires_grad_(False)
    layer = Attention.from_dense(dense, rank=2)
    for each in PROJECTIONS:
        for child in getattr(layer, each).children():
            assert child.weight.requires_grad == (each != name)


def test_every_projection_has_its_own_rank():
    dense = Call({}).dense()
    layer = Attention.from_dense(dense, rank=(1, None, 3, 4))
    assert layer.rank == (1, None, 3, 4)
    assert "rank=(1, None, 3, 4)" in repr(layer)
    assert type(layer.k_proj) is nn.Linear
    assert torch.equal(layer.k_proj.weight, dense.in_proj_weight[EMBED : 2 * EMBED])
    assert torch.equal(layer.k_proj.bias, dense.in_proj_bias[EMBED : 2 * EMBED])
    for name, rank in (("q_proj", 1), ("v_proj", 3), ("out_proj", 4)):
        assert type(getattr(layer, name)) is lr.LowRankLinear
        assert getattr(layer, name).rank == rank
    assert Attention(EMBED, HEADS, rank=[1, None, 3, 4]).rank == (1, None, 3, 4)
    assert Attention.from_dense(dense, rank=None).rank == (None,) * 4


def test_every_projection_is_the_best_of_its_rank():
    dense = Call({}).dense()
    layer = Attention.from_dense(dense, rank=3)
    weights = [*dense.in_proj_weight.detach().chunk(3), dense.out_proj.weight.detach()]
    for name, weight in zip(PROJECTIONS, weights, strict=True):
        values = torch.linalg.svdvals(weight)
        tail = float(torch.linalg.vector_norm(values[3:]) / torch.linalg.vector_norm(values))
        assert relative(getattr(layer, name).weight, weight) == pytest.approx(tail, rel=1e-4)


def test_all_dense_is_the_same_to_the_bit_after_the_way_back():
    for call in FEW:
        dense = call.dense()
        back = Attention.from_dense(dense, rank=None).to_dense()
        for name, tensor in dense.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "rule", [lr.Energy(0.9), lr.ParameterFraction(0.5), lr.RelativeError(0.3), lr.EVBMF()], ids=str
)
def test_rules_choose_for_every_projection(rule):
    dense = Call({}, separate=True).dense()
    layer = Attention.from_dense(dense, rank=rule)
    weights = [dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight, dense.out_proj.weight]
    for rank, weight in zip(layer.rank, weights, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight = nn.Parameter(weight.detach())
        assert rank == lr.LowRankLinear.from_dense(linear, rank=rule).rank
    assert Attention.from_dense(dense, rank=(rule, None, 2, rule)).rank[1:3] == (None, 2)


def test_ranks_are_clamped_to_the_widths():
    layer = full(Call({}, separate=True).dense())
    assert layer.rank == (EMBED, KDIM, VDIM, EMBED)
    assert Attention(EMBED, HEADS, kdim=KDIM, vdim=VDIM, rank=MORE).rank == layer.rank


def test_a_subclass_is_refused():
    class Own(nn.MultiheadAttention):
        pass

    for other in (
        Own(EMBED, HEADS),
        nn.Linear(4, 4),
        Attention(EMBED, HEADS, rank=2),
        nn.TransformerEncoderLayer(4, 2),
    ):
        with pytest.raises(lr.UnsupportedLayerError, match=rf"{type(other).__name__}, expected nn.MultiheadAttention"):
            Attention.from_dense(other, rank=2)


DERIVED = {
    "orthogonal in": lambda a: parametrizations.orthogonal(a, "in_proj_weight"),
    "weight_norm out": lambda a: parametrizations.weight_norm(a.out_proj),
    "spectral_norm out": lambda a: nn.utils.spectral_norm(a.out_proj),
    "spectral_norm in": lambda a: nn.utils.spectral_norm(a, "in_proj_weight"),
    "pruned out": lambda a: prune.l1_unstructured(a.out_proj, "weight", 0.5),
    "pruned in": lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.5),
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_a_computed_weight_is_refused(derive):
    dense = nn.MultiheadAttention(EMBED, HEADS)
    derive(dense)
    with pytest.raises(lr.UnsupportedLayerError):
        Attention.from_dense(dense, rank=2)


@pytest.mark.parametrize(
    "rank", [*BAD_RANKS, lr.Energy, (1, 2, 3), (1, 2, 3, 4, 5), [], (1, 2, 3, 0), (2, 2, 2, "b")], ids=repr
)
def test_bad_ranks_are_refused_by_name(rank):
    with pytest.raises(lr.LowRankError, match="rank"):
        Attention.from_dense(Call({}).dense(), rank=rank)
    with pytest.raises(lr.LowRankError, match="rank"):
        Attention(EMBED, HEADS, rank=rank)


@pytest.mark.parametrize(("embed", "heads"), [(10, 3), (0, 1), (8, 0), (-8, 2), (8, -2)])
def test_heads_that_do_not_divide_the_size_are_refused(embed, heads):
    with pytest.raises(lr.LowRankError, match=f"embed_dim={embed} and num_heads={heads}"):
        Attention(embed, heads, rank=2)


def test_a_nested_tensor_is_refused():
    layer = small(Call({"batch_first": True}))
    nested = torch.nested.as_nested_tensor([torch.randn(3, EMBED), torch.randn(2, EMBED)], layout=torch.jagged)
    with pytest.raises(lr.LowRankError, match="nested"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_refused(name, value):
    dense = Call({}).dense()
    with torch.no_grad():
        dense.get_parameter(name)[0, 0] = value
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        Attention.from_dense(dense, rank=2)


def test_weights_without_values_are_refused():
    with pytest.raises(lr.LowRankError, match="meta"):
        Attention.from_dense(nn.MultiheadAttention(EMBED, HEADS, device="meta"), rank=2)
