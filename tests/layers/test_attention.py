"""``LowRankMultiheadAttention`` against ``nn.MultiheadAttention``, which is the oracle of every case."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lowrank_layers as lr

from ..contracts.tables import BAD_RANKS, HALF_TOLERANCE, relative

EMBED, HEADS, KDIM, VDIM = 12, 3, 7, 5
LENGTH, SOURCE, BATCH = 4, 6, 2
TIGHT = 1e-5
MORE = 10_000
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

Attention = lr.LowRankMultiheadAttention


@dataclass(frozen=True)
class Call:
    """One way to call an attention.

    Args:
        settings: of the constructor besides sizes.
        separate: keys and values of their own widths.
        cross: keys and values of another length than the queries.
        batched: whether there is a batch dimension.
    """

    settings: dict[str, Any]
    separate: bool = False
    cross: bool = True
    batched: bool = True

    @property
    def name(self) -> str:
        switches = [key if value is True else f"no {key}" for key, value in self.settings.items()]
        words = ["separate"] * self.separate + ["self"] * (not self.cross) + ["unbatched"] * (not self.batched)
        return ", ".join([*words, *switches]) or "plain"

    @property
    def source(self) -> int:
        return SOURCE if self.cross else LENGTH

    def dense(self, **more: Any) -> nn.MultiheadAttention:
        widths = {"kdim": KDIM, "vdim": VDIM} if self.separate else {}
        attention = nn.MultiheadAttention(EMBED, HEADS, **{**self.settings, **widths, **more})
        with torch.no_grad():  # torch starts its biases at zero, where a wrong one would not show
            for name, parameter in attention.named_parameters():
                if "bias" in name:
                    parameter.normal_()
        return attention

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        def one(length: int, width: int) -> Tensor:
            if not self.batched:
                return torch.randn(length, width, dtype=dtype)
            lead = (BATCH, length) if self.settings.get("batch_first") else (length, BATCH)
            return torch.randn(*lead, width, dtype=dtype)

        if not self.cross and not self.separate:
            return (one(LENGTH, EMBED),) * 3
        widths = (KDIM, VDIM) if self.separate else (EMBED, EMBED)
        return one(LENGTH, EMBED), one(self.source, widths[0]), one(self.source, widths[1])


def switches() -> Iterator[dict[str, bool]]:
    """Every combination of torch's switches, those that are torch's defaults left out."""
    names = {"bias": False, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True}
    for chosen in product([False, True], repeat=len(names)):
        yield {name: value for (name, value), on in zip(names.items(), chosen, strict=True) if on}


CALLS = [
    Call(settings, separate, cross, batched)
    for settings in switches()
    for separate, cross, batched in product([False, True], repeat=3)
    if batched or "batch_first" not in settings
]
FEW = [
    Call({}),
    Call({}, cross=False),
    Call({"batch_first": True}, cross=False),
    Call({"add_bias_kv": True, "add_zero_attn": True}),
    Call({"bias": False, "batch_first": True}, separate=True),
    Call({}, cross=False, batched=False),
]
calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
few = pytest.mark.parametrize("call", FEW, ids=lambda call: call.name)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_masks(call: Call, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Bool and float, for all or for every head; no row loses all its keys."""
    flat = torch.rand(LENGTH, call.source, generator=generator()) > 0.6
    flat[:, 0] = False
    every = torch.rand((BATCH if call.batched else 1) * HEADS, LENGTH, call.source, generator=generator(2)) > 0.6
    every[..., 0] = False
    noise = torch.randn(flat.shape, generator=generator(3), dtype=dtype)
    return {
        "none": None,
        "bool": flat,
        "float": noise,
        "float with -inf": noise.masked_fill(flat, float("-inf")),
        "bool per head": every,
        "float per head": torch.randn(every.shape, generator=generator(4), dtype=dtype),
    }


def padding_masks(call: Call, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    shape = (BATCH, call.source) if call.batched else (call.source,)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., -1] = True
    return {"none": None, "bool": mask, "float": torch.zeros(shape, dtype=dtype).masked_fill(mask, float("-inf"))}


def masks(call: Call, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Tensor | None]]:
    """Both masks together where torch takes them together: of one type."""
    for (name, attention), (kind, padding) in product(
        attention_masks(call, dtype).items(), padding_masks(call, dtype).items()
    ):
        if "none" in (name, kind) or name.startswith(kind):
            yield {"attn_mask": attention, "key_padding_mask": padding}


def full(dense: nn.Module) -> lr.LowRankMultiheadAttention:
    return Attention.from_dense(dense, rank=MORE)


def assert_same(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], bound: float = TIGHT):
    assert relative(got[0], expected[0]) < bound
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        assert relative(got[1], expected[1]) < bound


def small(call: Call, **more: Any) -> lr.LowRankMultiheadAttention:
    """An attention that has lost something."""
    return Attention.from_dense(call.dense(**more), rank=2)


# ----------------------------------------------------------------------------------------------------- same function


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


# --------------------------------------------------------------------------------------------------------- dropout


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
    drawn = torch.stack([layer(*x, need_weights=weights)[0].detach() for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    assert relative(drawn.mean(0), quiet) < 0.05  # the mean is kept, since what follows is linear
    dense.train()
    torchs = torch.stack([dense(*x, need_weights=weights)[0].detach() for _ in range(4000)])
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


# ------------------------------------------------------------------------------------------------- there and back


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


# ------------------------------------------------------------------------------------------------------------ ranks


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


# -------------------------------------------------------------------------------------------------- a torch citizen


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


@few
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


# -------------------------------------------------------------------------------------------------------- refusals


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
