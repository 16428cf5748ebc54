"""Every factored layer is an ordinary torch module: signature, state, copies, devices, dtypes, compilers, training."""

import copy
import inspect
import pickle

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.layers import FACTORED_LAYERS

from .layer_checks import TIGHT, converted, no_padding_warning, rows, unfolded
from .tables import HALF_TOLERANCE, HALVES, relative

pytestmark = no_padding_warning


@rows
def test_the_signature_begins_with_torchs(row):
    torchs = [p for p in inspect.signature(row.cls.dense_type).parameters.values() if not p.name.startswith("_")]
    ours = list(inspect.signature(row.cls).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(torchs)]] == [(p.name, p.default) for p in torchs]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in ours[: len(torchs)])
    assert [p.name for p in ours[len(torchs) :]][:1] == ["rank"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(torchs) :])
    with pytest.raises(TypeError, match="rank"):
        row.cls(**row.variants["plain"], **row.form)


@rows
def test_nothing_is_shared_with_the_source_layer(row):
    for rank in ("small", "full"):
        dense, factored = converted(row, rank=None if rank == "small" else row.full_rank(row.dense()))
        before = {name: p.detach().clone() for name, p in dense.named_parameters()}
        back = factored.to_dense()
        own = {p.untyped_storage().data_ptr() for p in factored.parameters()}
        assert len(own) == len(list(factored.parameters()))
        assert not own & {p.untyped_storage().data_ptr() for p in dense.parameters()}
        assert not own & {p.untyped_storage().data_ptr() for p in back.parameters()}
        with torch.no_grad():
            for p in factored.parameters():
                p.fill_(7)
        assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())


@rows
def test_children_are_plain_torch_modules_that_own_all_parameters(row):
    layer = row.fresh()
    children = list(layer.children())
    assert all(type(child).__module__.startswith("torch.nn") for child in children)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for c in children for p in c.parameters())
    assert [c for c in children if getattr(c, "bias", None) is not None] in ([], children[-1:])
    assert tuple(name for name, _ in layer.named_buffers()) == row.buffers
    assert not any(buffer.is_floating_point() for buffer in layer.buffers())


@rows
def test_state_dict_round_trip(row, tmp_path):
    for variant in row.variants:
        layer, other = row.fresh(variant), row.fresh(variant)
        x = row.input(layer.to_dense())
        torch.save(layer.state_dict(), tmp_path / "weights.pt")
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
        assert torch.equal(other(x), layer(x)), variant


@rows
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_clones_compute_the_same_and_stand_alone(row, clone):
    for variant in row.variants:
        layer = row.fresh(variant).eval()
        other = clone(layer)
        x = row.input(layer.to_dense())
        assert repr(other) == repr(layer)
        assert not other.training
        assert torch.equal(other(x), layer(x)), variant
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert bool(next(layer.parameters()).any())


@rows
def test_meta_device(row):
    for variant in row.variants:
        real = row.fresh(variant)
        empty = row.fresh(variant, device="meta")
        assert all(p.is_meta for p in empty.parameters())
        assert all(p.is_meta for p in empty.to_dense().parameters())
        assert empty.rank == real.rank
        filled = empty.to_empty(device="cpu")
        filled.load_state_dict(real.state_dict())
        x = row.input(real.to_dense())
        assert torch.equal(filled(x), real(x)), variant
        with torch.device("meta"):
            assert all(p.is_meta for p in row.fresh(variant).parameters())


@rows
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(row, dtype):
    dense = row.dense(dtype=dtype)
    exact = copy.deepcopy(dense).float()
    x = row.input(exact)
    short = x.to(dtype) if x.is_floating_point() else x
    layer = row.from_dense(dense, rank=row.full_rank(dense))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(short).dtype == dtype
    assert relative(layer(short), exact(x)) < HALF_TOLERANCE[dtype]
    back = layer.to_dense()
    assert back.weight.dtype == dtype
    assert relative(back.weight, dense.weight) < HALF_TOLERANCE[dtype]
    factors = layer.factors().to_dense()
    assert factors.dtype == dtype
    expected = unfolded(row, dense.weight)
    assert relative(factors.reshape(expected.shape), expected) < HALF_TOLERANCE[dtype]
    fresh = row.fresh(dtype=dtype)
    assert {p.dtype for p in fresh.parameters()} == {dtype}
    assert bool(fresh(short).isfinite().all())


@rows
def test_autocast(row):
    dense, layer = converted(row)
    x = row.input(dense)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(layer(x), expected) < HALF_TOLERANCE[torch.bfloat16]


@rows
def test_compiles_into_one_graph(row):
    for variant in row.smoke:
        torch._dynamo.reset()
        layer = row.fresh(variant)
        x = row.input(layer.to_dense())
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected, got = layer(x), compiled(x)
        assert relative(got, expected) < TIGHT
        parameters = list(layer.parameters())
        weights = torch.randn(expected.shape)
        eager = torch.autograd.grad((expected * weights).sum(), parameters)
        graph = torch.autograd.grad((got * weights).sum(), parameters)
        for a, b in zip(graph, eager, strict=True):
            assert relative(a, b) < TIGHT


@rows
def test_exports_with_a_dynamic_batch(row):
    for variant in row.smoke:
        layer = row.fresh(variant).eval()
        dense = layer.to_dense()
        program = torch.export.export(layer, (row.input(dense, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (2, 5):
            x = row.input(dense, batch)
            assert relative(program.module()(x), layer(x)) < TIGHT


@rows
def test_mode_dtype_device_and_gradient_flags_are_kept(row):
    for training in (True, False):
        for weight_learns in (True, False):
            for bias_learns in (True, False):
                dense = row.dense(dtype=torch.float64).train(training)
                dense.weight.requires_grad_(weight_learns)
                with_bias = getattr(dense, "bias", None) is not None
                if with_bias:
                    dense.bias.requires_grad_(bias_learns)
                factored = row.from_dense(dense, rank=row.small)
                back = factored.to_dense()
                assert all(module.training == training for module in factored.modules())
                assert back.training == training
                for name, parameter in factored.named_parameters():
                    expected = bias_learns if name.endswith("bias") else weight_learns
                    assert parameter.requires_grad == expected, name
                    assert parameter.is_leaf
                assert back.weight.requires_grad == weight_learns
                assert not with_bias or back.bias.requires_grad == bias_learns
                parameters = [*factored.parameters(), *back.parameters()]
                assert {p.dtype for p in parameters} == {torch.float64}
                assert {p.device for p in parameters} == {dense.weight.device}


@rows
def test_it_learns(row):
    layer = row.fresh()
    x = row.input(layer.to_dense(), batch=4)
    target = torch.randn(layer(x).shape)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@rows
def test_the_rank_is_printed(row):
    layer = row.fresh()
    assert f"rank={layer.rank}" in layer.extra_repr()
    assert f"rank={layer.rank}" in repr(layer)


@rows
def test_global_random_state_is_left_alone(row):
    dense = row.dense()
    before = torch.get_rng_state()
    layer = row.from_dense(dense, rank=row.small)
    layer.factors()
    assert torch.equal(torch.get_rng_state(), before)


@rows
def test_from_dense_gives_the_same_layer_twice(row):
    dense = row.dense()
    first, second = (row.from_dense(dense, rank=row.small) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))


@rows
def test_it_is_registered_by_name(row):
    assert FACTORED_LAYERS[row.cls.__name__] is row.cls
    assert issubclass(row.cls, lr.FactoredModule)
    assert row.cls.__module__.startswith("lowrank_layers.")
