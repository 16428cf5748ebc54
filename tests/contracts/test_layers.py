"""What every factored layer promises, checked for every row of LAYERS."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import lowrank_layers as lr

from .tables import BAD_RANKS, HALF_TOLERANCE, HALVES, LAYERS, LayerRow, relative

TIGHT = 1e-5
"""Relative error in fp32 of what is exact in exact arithmetic."""

rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
rows_and_variants = pytest.mark.parametrize(
    ("row", "variant"),
    [pytest.param(row, variant, id=f"{row.name}-{variant}") for row in LAYERS for variant in row.variants],
)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SETTINGS = [
    *("in_features", "out_features"),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
]


def settings_of(module: nn.Module) -> dict:
    return {name: getattr(module, name) for name in SETTINGS if hasattr(module, name)}


def converted(row: LayerRow, variant: str = "plain", rank=None, **more) -> tuple[nn.Module, lr.FactoredModule]:
    """A dense layer and its low-rank form, at the small rank unless told."""
    dense = row.dense(variant, **more)
    return dense, row.from_dense(dense, rank=row.small if rank is None else rank)


def unfolded(row: LayerRow, weight: torch.Tensor) -> torch.Tensor:
    """The weight as ``factors()`` sees it."""
    return weight if row.matrix is None else row.matrix(weight)


# ------------------------------------------------------------------------------------------------ same function


@rows_and_variants
@pytest.mark.parametrize("batch", [2, None], ids=["batched", "unbatched"])
def test_full_rank_computes_what_the_dense_layer_computes(row, variant, batch):
    if batch is None and not row.unbatched:
        pytest.skip("takes no unbatched input without offsets")
    dense = row.dense(variant)
    factored = row.from_dense(dense, rank=row.full_rank(dense))
    x = row.input(dense, batch)
    if not x.is_floating_point():
        assert relative(factored(x), dense(x)) < TIGHT
        return
    x, again = x.requires_grad_(), x.detach().clone().requires_grad_()
    expected = dense(x)
    got = factored(again)
    assert relative(got, expected) < TIGHT
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    assert relative(again.grad, x.grad) < TIGHT


@rows_and_variants
def test_small_rank_computes_what_its_dense_form_computes(row, variant):
    _, factored = converted(row, variant)
    dense = factored.to_dense()
    assert type(dense) is row.cls.dense_type
    x = row.input(dense)
    assert relative(factored(x), dense(x)) < TIGHT


@rows_and_variants
def test_a_fresh_layer_computes_what_its_dense_form_computes(row, variant):
    factored = row.fresh(variant)
    dense = factored.to_dense()
    x = row.input(dense)
    assert relative(factored(x), dense(x)) < TIGHT


@rows_and_variants
def test_settings_survive_the_way_there_and_back(row, variant):
    dense, factored = converted(row, variant)
    back = factored.to_dense()
    assert settings_of(back) == settings_of(dense)
    assert (getattr(back, "bias", None) is None) == (getattr(dense, "bias", None) is None)
    assert back.weight.shape == dense.weight.shape
    again = row.from_dense(back, rank=factored.rank)
    x = row.input(dense)
    assert again.rank == factored.rank
    if row.again and (
        row.matrix is not None or isinstance(factored.rank, tuple)
    ):  # ALS does not promise to find its optimum twice
        assert relative(again(x), factored(x)) < TIGHT


@rows_and_variants
def test_the_constructor_takes_the_settings_that_from_dense_takes(row, variant):
    dense, factored = converted(row, variant)
    fresh = row.fresh(variant)
    assert fresh.rank == factored.rank
    assert repr(fresh) == repr(factored)
    assert settings_of(fresh) == settings_of(factored)
    fresh.load_state_dict(factored.state_dict())
    x = row.input(dense)
    assert torch.equal(fresh(x), factored(x))


@pytest.mark.parametrize("row", [row for row in LAYERS if row.channels_last], ids=lambda row: row.name)
def test_channels_last_changes_nothing(row):
    dense = row.dense().to(memory_format=torch.channels_last)
    x = row.input(dense).to(memory_format=torch.channels_last)
    full = row.from_dense(dense, rank=row.full_rank(dense)).to(memory_format=torch.channels_last)
    assert relative(full(x), dense(x)) < TIGHT
    assert relative(row.from_dense(dense, rank=row.full_rank(dense))(x), dense(x)) < TIGHT
    assert full(x).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------- mathematics


@rows
def test_gradients_are_right_in_float64(row):
    _, layer = converted(row, dtype=torch.float64)
    x = row.input(layer.to_dense())
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    tail = (x.requires_grad_(),) if x.is_floating_point() else ()

    def forward(*arguments):
        weights, inputs = arguments[: len(names)], arguments[len(names) :] or (x,)
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), inputs)

    assert torch.autograd.gradcheck(forward, (*values, *tail))


@pytest.mark.parametrize("row", [row for row in LAYERS if row.matrix is not None], ids=lambda row: row.name)
def test_the_error_is_the_tail_of_the_singular_values(row):
    dense = row.dense("prime", dtype=torch.float64)
    weight = dense.weight.detach()
    values = torch.linalg.svdvals(row.matrix(weight))
    for rank in range(1, len(values) + 1):
        layer = row.from_dense(dense, rank=rank)
        tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert layer.rank == rank
        assert relative(layer.to_dense().weight, weight) == pytest.approx(tail, rel=1e-10, abs=1e-13)
        assert torch.allclose(layer.factors().s, values[:rank], rtol=1e-10)


@pytest.mark.parametrize(
    "row", [row for row in LAYERS if row.matrix is not None and not row.form], ids=lambda row: row.name
)
def test_the_singular_values_stand_half_on_either_side(row):
    dense, layer = converted(row, dtype=torch.float64)
    expected = torch.linalg.svdvals(row.matrix(dense.weight.detach()))[: layer.rank].sqrt()
    for child in layer.children():
        weight = child.weight.detach()
        values = torch.linalg.svdvals(weight.flatten(1))
        assert torch.allclose(values, expected, rtol=1e-10)


@rows
def test_the_error_falls_with_the_rank_and_ends_at_zero(row):
    dense = row.dense(dtype=torch.float64)
    small = row.from_dense(dense, rank=row.small)
    full = row.from_dense(dense, rank=row.full_rank(dense))
    assert 1e-2 < relative(small.to_dense().weight, dense.weight) < 1
    assert relative(full.to_dense().weight, dense.weight) < 1e-6


@rows
def test_factors_are_the_dense_weight(row):
    for layer in (converted(row)[1], row.fresh()):
        factors = layer.factors()
        weight = layer.to_dense().weight
        assert isinstance(factors, lr.Factorization)
        assert relative(factors.to_dense().reshape(unfolded(row, weight).shape), unfolded(row, weight)) < TIGHT
        assert not factors.to_dense().requires_grad
        rank = factors.rank if isinstance(layer.rank, int) else factors.rank[:2]
        assert rank == layer.rank


@rows
def test_ranks_above_the_dimension_change_nothing(row):
    dense = row.dense()
    full = row.from_dense(dense, rank=row.full_rank(dense))
    above = row.from_dense(dense, rank=row.excess)
    assert above.rank == full.rank
    for name, parameter in full.named_parameters():
        assert torch.equal(above.get_parameter(name), parameter)
    for variant in row.variants:
        assert row.fresh(variant, rank=row.excess).rank == row.full_rank(row.dense(variant)), variant


@rows
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_are_recovered_at_the_small_rank(row, value):
    dense = row.dense()
    nn.init.constant_(dense.weight, value)
    layer = row.from_dense(dense, rank=row.small)
    assert torch.allclose(layer.to_dense().weight, dense.weight, rtol=TIGHT, atol=TIGHT)
    x = row.input(dense)
    assert torch.allclose(layer(x), dense(x), rtol=TIGHT, atol=TIGHT * row.input(dense).numel())


@rows
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60], ids=["tiny", "huge"])
def test_the_scale_of_the_weights_does_not_matter(row, scale):
    dense = row.dense(**({"bias": False} if hasattr(row.dense(), "bias") else {}))
    scaled = copy.deepcopy(dense)
    with torch.no_grad():
        scaled.weight.mul_(scale)
    small, large = (row.from_dense(d, rank=row.small).to_dense().weight for d in (dense, scaled))
    assert relative(large / scale, small) < TIGHT


@rows
def test_a_fresh_layer_has_the_output_variance_of_its_dense_twin(row):
    settings, rank = row.wide
    energies: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for seed in range(60):
            torch.manual_seed(seed)
            dense, factored = row.cls.dense_type(**settings), row.cls(**settings, **row.form, rank=rank)
            x = row.sample(dense, (8,))
            energies[True].append(float(dense(x).square().mean()))
            energies[False].append(float(factored(x).square().mean()))
    dense, factored = torch.tensor(energies[True]), torch.tensor(energies[False])
    spread = float((dense.var() + factored.var()).sqrt()) / 60**0.5
    assert spread < 0.06 * dense.mean()  # else the next line would prove nothing
    assert abs(float(dense.mean() - factored.mean())) < 3.5 * spread


@rows
def test_fresh_layers_differ_and_follow_the_seed(row):
    torch.manual_seed(3)
    first, second = row.fresh(), row.fresh()
    torch.manual_seed(3)
    again = row.fresh()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, second.get_parameter(name))


@rows
def test_two_flops_a_mac_is_what_torch_counts(row):
    for variant, settings in row.variants.items():
        if "max_norm" in settings:
            continue  # how many rows are renormalized, and so the work, depends on the data
        for layer in (row.dense(variant), row.fresh(variant)):
            dense = layer.to_dense() if isinstance(layer, lr.FactoredModule) else layer
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(row.input(dense, batch=3))
            cost = lr.layer_cost(layer, row.sample_shape(dense))
            assert 2 * 3 * cost.macs == counter.get_total_flops(), variant
            assert cost.params == sum(p.numel() for p in layer.parameters())
            assert cost.bytes == sum(p.numel() * p.element_size() for p in layer.parameters())


# -------------------------------------------------------------------------------------------- a torch citizen


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
    assert not list(layer.buffers())


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                layer, (row.input(dense, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
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
def test_it_is_registered_and_says_what_it_stands_for(row):
    from lowrank_layers.layers import FACTORED_LAYERS

    assert FACTORED_LAYERS[row.cls.__name__] is row.cls
    assert issubclass(row.cls, lr.FactoredModule)
    assert row.cls.__module__.startswith("lowrank_layers.")


# ----------------------------------------------------------------------------------------------------- refusals


@rows
@pytest.mark.parametrize("rank", [*BAD_RANKS, None, lr.Energy], ids=repr)
def test_bad_ranks_are_refused_by_name(row, rank):
    with pytest.raises(lr.LowRankError, match=rf"{row.cls.__name__}.*rank"):
        row.from_dense(row.dense(), rank=rank)
    with pytest.raises(lr.LowRankError, match=rf"{row.cls.__name__}.*rank"):
        row.cls(**row.variants["plain"], **row.form, rank=rank)


@rows
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_refused(row, value):
    dense = row.dense()
    with torch.no_grad():
        dense.weight.flatten()[3] = value
    with pytest.raises(lr.LowRankError, match=f"{row.cls.__name__}.*NaN or Inf"):
        row.from_dense(dense, rank=row.small)


@rows
def test_weights_without_values_are_refused(row):
    with pytest.raises(lr.LowRankError, match=f"{row.cls.__name__}.*meta device"):
        row.from_dense(row.dense(device="meta"), rank=row.small)


@rows
def test_integer_weights_are_refused(row):
    dense = row.dense()
    dense.weight = nn.Parameter((dense.weight.detach() * 50).to(torch.int8), requires_grad=False)
    with pytest.raises(lr.LowRankError, match=f"{row.cls.__name__}.*int8"):
        row.from_dense(dense, rank=row.small)


PARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_weights_are_refused_with_the_remedy(how):
    for row in LAYERS:
        with pytest.raises(lr.UnsupportedLayerError, match=f"{row.cls.__name__}.*parametrized.*remove"):
            row.from_dense(PARAMETRIZED[how](row.dense()), rank=row.small)


@pytest.mark.parametrize(
    "row", [row for row in LAYERS if hasattr(nn, f"Lazy{row.cls.dense_type.__name__}")], ids=lambda row: row.name
)
def test_lazy_layers_are_refused_with_the_remedy(row):
    lazy = getattr(nn, f"Lazy{row.cls.dense_type.__name__}")
    arguments = [p for p in inspect.signature(lazy).parameters if p in row.variants["plain"]]
    with pytest.raises(lr.UnsupportedLayerError, match=f"{row.cls.__name__}.*not initialized.*batch"):
        row.from_dense(lazy(**{name: row.variants["plain"][name] for name in arguments}), rank=row.small)


@rows
def test_other_modules_subclasses_and_factored_layers_are_refused(row):
    class Special(row.cls.dense_type):
        def forward(self, x):
            return -super().forward(x)

    foreign = [nn.ReLU(), nn.Bilinear(3, 4, 3), Special(**row.variants["plain"]), row.fresh()]
    for module in foreign:
        with pytest.raises(lr.UnsupportedLayerError, match=f"{row.cls.__name__}.*{type(module).__name__}"):
            row.from_dense(module, rank=row.small)


@rows
def test_rank_rules_that_need_values_are_refused_by_the_constructor(row):
    with pytest.raises(lr.LowRankError, match=rf"{row.cls.__name__}.*Energy\(fraction=0\.9\).*ParameterFraction"):
        row.cls(**row.variants["plain"], **row.form, rank=lr.Energy(0.9))


@rows
def test_a_parameter_fraction_is_kept(row):
    settings, _ = row.wide
    for fraction in (0.1, 0.3, 0.7):
        for layer in (
            row.cls(**settings, **row.form, rank=lr.ParameterFraction(fraction), device="meta"),
            row.from_dense(row.cls.dense_type(**settings), rank=lr.ParameterFraction(fraction)),
        ):
            weights = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
            dense = row.cls.dense_type(**settings, device="meta").weight.numel()
            assert 0.6 * fraction * dense < weights <= fraction * dense


@rows
def test_autocast_does_not_touch_the_factors(row):
    """A layer made inside a region of autocast has the factors of one made outside."""
    for variant in row.smoke:
        dense = row.dense(variant)
        expected = row.from_dense(dense, rank=row.small)
        with torch.autocast("cpu", torch.bfloat16):
            got = row.from_dense(dense, rank=row.small)
        for (name, a), (_, b) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(a, b), name


# ---------------------------------------------------------------------------------------------------- calibration


@rows_and_variants
@pytest.mark.parametrize("side", ["left", "right"])
def test_calibration_counts_no_padding(row, variant, side):
    """The statistics of padded samples, whatever stands in the padding, are those of the samples."""
    if row.variants[variant].get("padding_mode", "zeros") != "zeros":
        pytest.skip("what is reflected at the end of a sample is not what is reflected at the end of its padding")
    dense = row.dense(variant).requires_grad_(False)
    x = row.sample(dense, (3, 5) if isinstance(dense, nn.Linear) else (3,))
    axes = range(2, x.ndim) if hasattr(dense, "kernel_size") else (1,)
    shape = [n + 4 if axis in axes else n for axis, n in enumerate(x.shape)]
    padded = torch.randint(dense.num_embeddings, shape) if not x.is_floating_point() else torch.full(shape, 1e3)
    if hasattr(dense, "kernel_size"):
        padded.zero_()  # a model that masks anything clears what a window would show of it
    if isinstance(dense, nn.EmbeddingBag) and dense.padding_idx is not None:
        padded.fill_(dense.padding_idx)
    place = [slice(None)] * x.ndim
    for axis in axes:
        place[axis] = slice(4, None) if side == "left" else slice(x.shape[axis])
    padded[tuple(place)] = x
    mask = torch.zeros([shape[0], *(shape[axis] for axis in axes)], dtype=torch.bool)
    mask[(slice(None), *(place[axis] for axis in axes))] = True

    def loss(output, target):
        return (output - 1).square().mean()

    model = nn.Sequential(dense)
    expected = lr.calibrate(model, [x], loss=loss)
    stats = lr.calibrate(model, [padded], loss=loss, mask=lambda batch: mask)
    assert stats.samples == expected.samples
    for key in ("input_shape", "positions", "repeats"):
        assert getattr(stats["0"], key) == getattr(expected["0"], key), key
    assert stats["0"].inputs.rows == expected["0"].inputs.rows
    assert relative(stats["0"].inputs.second, expected["0"].inputs.second) < 1e-6
    assert relative(stats["0"].inputs.mean, expected["0"].inputs.mean) < 1e-5
    if not isinstance(dense, nn.EmbeddingBag) or dense.padding_idx is not None:  # others mix padding into the bag
        assert relative(stats["0"].gradients, expected["0"].gradients) < 1e-5
