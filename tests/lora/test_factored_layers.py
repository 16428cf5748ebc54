"""Adapters on factored transposed convolutions, and on bags."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_layers as lr

from .test_adapters import everything, scramble

FAMILIES = {"pair": "LowRankConvTranspose", "tucker": "TuckerConvTranspose", "cp": "CPConvTranspose"}
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2, "stride": 3, "padding": 1, "output_padding": 2},
    "grouped": {"groups": 2, "stride": 2, "bias": False},
    "all": {"groups": 2, "stride": 3, "padding": 1, "output_padding": 1, "dilation": 2},
}
families = pytest.mark.parametrize("family", FAMILIES)
dimensions = pytest.mark.parametrize("dims", [1, 2, 3])


def build(family, dims, **settings):
    kind = getattr(lr, f"{FAMILIES[family]}{dims}d")
    rank = (2, 2) if family == "tucker" else 2
    return nn.Sequential(kind(4, 6, (3, 2, 3)[:dims], **settings, rank=rank)), torch.randn(2, 4, *(4, 5, 3)[:dims])


def dense_with_delta(model):
    """The dense layer of the base and the formed delta."""
    dense = lr.remove_lora_(copy.deepcopy(model))[0].to_dense()
    bank = model[0].lora_weight
    with torch.no_grad():
        for adapter, gate in zip(bank, bank.gates, strict=True):
            dense.weight.add_(gate * adapter.delta(bank.layout))
    return dense


@families
@dimensions
@pytest.mark.parametrize("name", SETTINGS)
def test_a_transposed_convolution_computes_what_the_dense_one_does(family, dims, name):
    model, x = build(family, dims, **SETTINGS[name])
    base = model(x)
    lr.add_lora_(model, everything, rank=2, alpha=6)
    assert torch.equal(model(x), base)
    scramble(model)
    dense, out = dense_with_delta(model), model(x)
    assert not torch.allclose(out, base, atol=1e-2)
    assert torch.allclose(out, dense(x), atol=1e-4)
    assert torch.allclose(model[0].weight, dense.weight, atol=1e-5)
    assert torch.allclose(model(x[0]), dense(x[0]), atol=1e-4)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)
    out.square().sum().backward()
    dense(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in lr.lora_parameters(model))
    lr.remove_lora_(model)
    assert torch.equal(model(x), base)
    assert type(model[0]).__name__ == f"{FAMILIES[family]}{dims}d"


@families
@dimensions
def test_the_output_size_is_honoured(family, dims):
    model, x = build(family, dims, stride=3, padding=1, groups=2)
    lr.add_lora_(model, everything, rank=2)
    scramble(model)
    dense = dense_with_delta(model)
    least = dense(x).shape[2:]
    for more in (0, 1, 2):
        size = [n + more for n in least]
        out = model[0](x, size)
        assert list(out.shape[2:]) == size
        assert torch.allclose(out, dense(x, size), atol=1e-4)
        assert torch.allclose(model[0](x, output_size=size), out)


@families
def test_several_adapters_of_other_ranks_add_up_and_mix_in_a_batch(family):
    model, x = build(family, 2, stride=2, groups=2)
    base = model(x)
    lr.add_lora_(model, everything, rank=2, name="a", init="orthogonal")
    lr.add_lora_(model, everything, rank=1, alpha=3, name="b")
    scramble(model)
    assert torch.allclose(model(x), dense_with_delta(model)(x), atol=1e-4)
    outs = {name: lr.use_adapter(model, name)(x) for name in ("a", "b")}
    with lr.lora_rows(model, ["b", None]):
        mixed = model(x)
    assert torch.allclose(mixed, torch.stack([outs["b"][0], base[1]]), atol=1e-5)
    assert not torch.allclose(mixed[0], base[0], atol=1e-2)


def test_dropout_is_on_the_input_of_the_delta():
    model, x = build("pair", 2)
    base = model(x)
    lr.add_lora_(model, everything, rank=2, dropout=0.5)
    assert torch.equal(model(x), base)
    scramble(model)
    full = model.eval()(x) - base
    model.train()
    mean = torch.stack([model(x) - base for _ in range(400)]).mean(0)
    assert not torch.allclose(model(x) - base, full, atol=1e-3)
    assert float((mean - full).detach().norm() / full.detach().norm()) < 0.15


@families
def test_it_compiles_to_one_graph_and_switching_recompiles_nothing(family):
    model, x = build(family, 2, stride=2, groups=2)
    base = model(x)
    lr.add_lora_(model, everything, rank=2)
    scramble(model)
    out = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), out, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"), lr.lora_disabled(model):
        assert torch.allclose(compiled(x), base, atol=1e-6)


@families
def test_merging_and_saving_say_what_to_do_and_densifying_does_it(family, tmp_path):
    model, x = build(family, 2)
    base = model(x)
    lr.add_lora_(model, everything, rank=2)
    scramble(model)
    out = model(x)
    with pytest.raises(lr.LowRankError, match="ConvTranspose2d, whose weight is a product; call densify_ first"):
        lr.merge_lora_(model)
    with pytest.raises(lr.UnsupportedLayerError, match="ConvTranspose2d: call densify_ first"):
        lr.save_lora(model, tmp_path)
    with pytest.raises(lr.UnsupportedLayerError, match="to renormalize; call densify_ first"):
        lr.add_lora_(model, everything, rank=2, name="b", dora=True)
    assert torch.equal(model(x), out)
    state = copy.deepcopy(model.state_dict())
    scramble(model)
    model.load_state_dict(state)
    assert torch.equal(model(x), out)
    assert torch.equal(copy.deepcopy(model)(x), out)
    dense = lr.densify_(lr.remove_lora_(model))
    assert torch.allclose(lr.add_lora_(dense, everything, rank=2)(x), base, atol=1e-5)


@families
def test_a_compressed_transposed_convolution_gets_back_what_was_lost(family):
    conv = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, stride=2))
    method = {"pair": "svd", "tucker": "tucker", "cp": "cp"}[family]
    model, x = copy.deepcopy(conv), torch.randn(2, 6, 5, 5)
    kind = getattr(lr, f"{FAMILIES[family]}2d")
    model[0] = kind.from_dense(conv[0], rank=(2, 2) if method == "tucker" else 3)
    lost = (model(x) - conv(x)).norm()
    residual = (conv[0].weight - model[0].weight).detach()
    lr.add_lora_(model, everything, rank=2, init=lr.LoftQ(conv))
    values = torch.linalg.svdvals(residual.flatten(1))
    assert float((conv[0].weight - model[0].weight).detach().norm()) == pytest.approx(
        float(values[2:].square().sum().sqrt()), rel=1e-4
    )
    assert (model(x) - conv(x)).norm() < lost


def test_singular_values_of_a_dense_transposed_convolution():
    """PiSSA's factors lie in its kernel as its matrix has them."""
    for conv in (nn.ConvTranspose2d(6, 8, 3), nn.ConvTranspose1d(6, 8, 2)):
        model = nn.Sequential(conv)
        best = lr.svd(conv.weight.detach().flatten(1), 2).to_dense()
        lr.add_lora_(model, everything, rank=2, init="pissa")
        bank = model[0].lora_weight
        adapter = bank.adapters["default"]
        assert torch.allclose(bank.layout.product(adapter.A, adapter.B).flatten(1), best, atol=1e-5)


def test_a_second_adapter_on_factored_layers():
    model, x = nn.Sequential(lr.LowRankLinear(8, 6, rank=3)), torch.randn(3, 8)
    lr.add_lora_(model, rank=2, name="a")
    lr.add_lora_(model, rank=1, name="b")
    scramble(model)
    assert torch.allclose(model(x), F.linear(x, model[0].weight, model[0].up.bias), atol=1e-5)


BAGS = {
    "rows": (torch.tensor([[1, 2, 4], [4, 3, 0]]), {}),
    "offsets": (torch.tensor([1, 2, 4, 5, 4, 3, 0]), {"offsets": torch.tensor([0, 3, 3])}),
    "last offset": (
        torch.tensor([1, 2, 4, 5]),
        {"offsets": torch.tensor([0, 3, 4]), "include_last_offset": True},
    ),
    "padding": (torch.tensor([[1, 2, 2], [4, 2, 0]]), {"padding_idx": 2}),
    "weights": (
        torch.tensor([[1, 2, 4], [4, 3, 0]]),
        {"per_sample_weights": torch.tensor([[1, 2, 3], [0, -1.0, 0.5]])},
    ),
}
CALL = ("offsets", "per_sample_weights")


DENSE = [("dense", mode, name) for mode in ("sum", "mean", "max") for name in BAGS]
FACTORED = [("factored", mode, name) for mode in ("sum", "mean") for name in BAGS]


@pytest.mark.parametrize(
    ("kind", "mode", "name"), [case for case in DENSE + FACTORED if case[2] != "weights" or case[1] == "sum"]
)
def test_bags_compute_what_the_formed_table_does(kind, mode, name):
    x, settings = BAGS[name]
    call = {key: value for key, value in settings.items() if key in CALL}
    form = {key: value for key, value in settings.items() if key not in CALL}
    layer = nn.EmbeddingBag(9, 6, mode=mode, **form)
    model = nn.Sequential(lr.LowRankEmbeddingBag.from_dense(layer, rank=3) if kind == "factored" else layer)
    base = model[0](x, **call)
    lr.add_lora_(model, everything, rank=2, name="a")
    lr.add_lora_(model, everything, rank=1, alpha=4, name="b")
    assert torch.equal(model[0](x, **call), base)
    scramble(model)
    out = model[0](x, **call)
    bank = model[0].lora_weight
    formed = model[0].weight.detach()
    plain = lr.remove_lora_(copy.deepcopy(model))[0]
    expected = plain.weight.detach() + sum(adapter.delta(bank.layout) for adapter in bank)
    assert torch.allclose(formed, expected, atol=1e-5)
    offsets, weights = call.get("offsets"), call.get("per_sample_weights")
    rest = (form.get("include_last_offset", False), form.get("padding_idx"))
    want = F.embedding_bag(x, expected, offsets, None, 2.0, False, mode, False, weights, *rest)
    assert not torch.allclose(out, base, atol=1e-2)
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.equal(model[0](x, offsets, weights), out)
    out.square().sum().backward()
    assert all(bool(p.grad.any()) for p in lr.lora_parameters(model))
    with lr.lora_disabled(model):
        assert torch.equal(model[0](x, **call), base)


@pytest.mark.parametrize("factored", [False, True])
def test_every_bag_of_a_batch_may_have_its_own_adapter(factored):
    layer = nn.EmbeddingBag(9, 6, mode="sum")
    model = nn.Sequential(lr.LowRankEmbeddingBag.from_dense(layer, rank=3) if factored else layer)
    x = torch.tensor([[1, 2, 4], [4, 3, 0]])
    base = model(x)
    lr.add_lora_(model, everything, rank=2, name="a")
    scramble(model)
    out = model(x)
    with lr.lora_rows(model, [None, "a"]):
        assert torch.allclose(model(x), torch.stack([base[0], out[1]]), atol=1e-6)


def test_a_bag_that_takes_the_maximum_has_no_rows_of_its_own():
    model = lr.add_lora_(nn.Sequential(nn.EmbeddingBag(9, 6, mode="max")), everything, rank=2)
    with lr.lora_rows(model, [None, "default"]), pytest.raises(lr.LowRankError, match="read as a whole"):
        model(torch.tensor([[1, 2, 4], [4, 3, 0]]))
