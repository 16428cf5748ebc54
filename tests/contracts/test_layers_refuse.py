"""What no factored layer can replace is refused by name, with the remedy; rules and autocast at construction."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowrank_layers as lr

from .layer_checks import no_padding_warning, rows
from .tables import BAD_RANKS, LAYERS

pytestmark = no_padding_warning


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
