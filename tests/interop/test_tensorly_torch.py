"""tensorly-torch's layers and ours compute the same, both ways."""

import sys

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.interop import from_tltorch, to_tltorch

from ..contracts.tables import relative
from ..layers.peers import peer_warnings

tltorch = pytest.importorskip("tltorch", reason="tensorly-torch is not installed (extra: tensorly)")
tensorly = pytest.importorskip("tensorly", reason="tensorly is not installed (extra: tensorly)")

pytestmark = peer_warnings
TIGHT = 1e-5
SIZES = {1: (12,), 2: (9, 8), 3: (5, 6, 4)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}

FORMS = {
    "plain": lambda dims: {},
    "no bias": lambda dims: {"bias": False},
    "everything": lambda dims: {
        "stride": (2, 1, 2)[:dims],
        "padding": (2, 1, 0)[:dims],
        "dilation": (1, 2, 1)[:dims],
        "bias": True,
    },
    "valid": lambda dims: {"padding": "valid", "stride": 2},
}

conv_cases = [
    pytest.param(family, dims, form, id=f"{family}-{dims}d-{form}")
    for family in ("CP", "Tucker")
    for dims in (1, 2, 3)
    for form in FORMS
]


def dense_conv(dims: int, form: str = "plain") -> nn.Module:
    return getattr(nn, f"Conv{dims}d")(6, 8, KERNELS[dims], **FORMS[form](dims))


def image(dims: int) -> torch.Tensor:
    return torch.randn(2, 6, *SIZES[dims])


def assert_unshared(a: nn.Module, b: nn.Module) -> None:
    assert not {p.untyped_storage().data_ptr() for p in a.parameters()} & {
        p.untyped_storage().data_ptr() for p in b.parameters()
    }


# ------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize(("family", "dims", "form"), conv_cases)
@pytest.mark.parametrize("origin", ["random", "decomposed"])
def test_convolutions_go_there_and_back(family, dims, form, origin):
    cls = getattr(lr, f"{family}Conv{dims}d")
    dense = dense_conv(dims, form)
    ours = cls.from_dense(dense, rank=3) if origin == "decomposed" else cls.like(dense, rank=3)
    if origin == "random":
        ours.reset_parameters()
    theirs = to_tltorch(ours)
    x = image(dims)
    assert type(theirs) is tltorch.FactorizedConv
    assert theirs.implementation == "factorized"
    assert relative(theirs(x), ours(x)) < TIGHT
    assert relative(theirs.weight.to_tensor(), ours.weight) < TIGHT
    back = from_tltorch(theirs)
    assert type(back) is cls
    assert back.rank == ours.rank
    assert relative(back(x), ours(x)) < TIGHT
    assert (back.last.bias is None) == (ours.last.bias is None)
    assert_unshared(ours, theirs)
    assert_unshared(back, theirs)


@pytest.mark.parametrize(("family", "dims", "form"), conv_cases)
@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
def test_their_convolutions_become_ours(family, dims, form, implementation):
    settings = {k: v for k, v in FORMS[form](dims).items() if v != "valid"}
    theirs = tltorch.FactorizedConv(
        6, 8, KERNELS[dims], factorization=family.lower(), rank=0.4, implementation=implementation, **settings
    )
    theirs.reset_parameters(std=0.2)
    ours = from_tltorch(theirs)
    x = image(dims)
    assert type(ours) is getattr(lr, f"{family}Conv{dims}d")
    assert relative(ours(x), theirs(x)) < TIGHT
    assert relative(to_tltorch(ours)(x), theirs(x)) < TIGHT


@pytest.mark.parametrize(("family", "dims"), [("cp", 2), ("tucker", 1), ("tucker", 2)])
def test_their_decomposed_convolution_becomes_ours(family, dims):
    # stride 1: tensorly-torch's from_conv keeps only the first stride
    theirs = tltorch.FactorizedConv.from_conv(dense_conv(dims), rank=0.5, factorization=family)
    x = image(dims)
    assert relative(from_tltorch(theirs)(x), theirs(x)) < TIGHT


@pytest.mark.parametrize("rank", [60, 100])
def test_more_components_than_a_kernel_can_have_are_reduced_exactly(rank):
    theirs = tltorch.FactorizedConv(6, 8, (3, 2), factorization="cp", rank=rank)
    theirs.reset_parameters(std=0.2)
    ours = from_tltorch(theirs)
    x = image(2)
    assert ours.rank == 36
    assert relative(ours(x), theirs(x)) < TIGHT


def test_tucker_ranks_above_the_unfoldings_are_reduced_exactly():
    weight = tltorch.TuckerTensor(torch.randn(20, 2, 3), [torch.randn(20, 20), torch.randn(2, 2), torch.randn(3, 3)])
    theirs = tltorch.FactorizedConv.from_factorization(weight)
    ours = from_tltorch(theirs)
    x = torch.randn(2, 2, 9)
    assert ours.rank == (6, 2)
    assert relative(ours(x), theirs(x)) < TIGHT


REFUSED = {
    "groups=2": lambda: lr.CPConv2d(6, 8, 3, groups=2, rank=2),
    "padding_mode='reflect'": lambda: lr.TuckerConv2d(6, 8, 3, padding=1, padding_mode="reflect", rank=2),
    "padding='same'": lambda: lr.CPConv1d(6, 8, 3, padding="same", rank=2),
    "CPConvTranspose2d": lambda: lr.CPConvTranspose2d(6, 8, 3, rank=2),
    "LowRankConv2d": lambda: lr.LowRankConv2d(6, 8, 3, rank=2),
    "Linear": lambda: nn.Linear(3, 3),
    "max_norm=1.0": lambda: lr.LowRankEmbedding(9, 6, max_norm=1.0, rank=2),
    "sparse=True": lambda: lr.LowRankEmbedding(9, 6, sparse=True, rank=2),
    "padding_idx=2": lambda: lr.TensorizedEmbedding(9, 6, padding_idx=2, rank=2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_tensorly_torch_cannot_express_is_refused_by_name(what):
    with pytest.raises(lr.UnsupportedLayerError, match=f"to_tltorch: got {what}"):
        to_tltorch(REFUSED[what]())


def hooked() -> nn.Module:
    conv = tltorch.FactorizedConv(6, 8, (3, 3), factorization="cp", rank=3)
    tltorch.tensor_dropout(conv.weight, 0.5)
    return conv


FOREIGN = {
    "got TRL": lambda: tltorch.TRL((4, 4), (2,), rank=2),
    "got TCL": lambda: tltorch.TCL((4, 4), (2, 2)),
    "got Linear": lambda: nn.Linear(3, 3),
    "n_layers=2": lambda: tltorch.FactorizedConv(6, 8, (3, 3), n_layers=2, rank=2),
    "the form TT": lambda: tltorch.FactorizedConv(6, 8, (3, 3), factorization="tt", rank=2),
    "tensor dropout": hooked,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_stands_for_no_layer_of_ours_is_refused(what):
    with pytest.raises(lr.UnsupportedLayerError, match=f"from_tltorch: .*{what}"):
        from_tltorch(FOREIGN[what]())


# ---------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("origin", ["random", "decomposed"])
def test_linear_layers_go_there_and_back(bias, origin):
    dense = nn.Linear(12, 8, bias=bias)
    ours = lr.LowRankLinear(12, 8, bias, rank=3) if origin == "random" else lr.LowRankLinear.from_dense(dense, rank=3)
    theirs = to_tltorch(ours)
    x = torch.randn(2, 5, 12)
    assert type(theirs) is tltorch.FactorizedLinear
    assert relative(theirs(x), ours(x)) < TIGHT
    assert relative(theirs.weight.to_matrix(), ours.weight) < TIGHT
    back = from_tltorch(theirs)
    assert back.rank == 3
    assert torch.equal(back.down.weight, ours.down.weight)
    assert relative(back(x), ours(x)) < TIGHT
    assert_unshared(ours, theirs)
    assert_unshared(back, theirs)


@pytest.mark.parametrize("factorization", ["cp", "tucker", "blocktt", "dense"])
@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
def test_their_linear_layers_become_a_pair_of_exact_rank(factorization, implementation):
    theirs = tltorch.FactorizedLinear(
        (3, 4), (2, 4), factorization=factorization, rank=2, implementation=implementation
    )
    nn.init.normal_(theirs.bias)
    ours = from_tltorch(theirs)
    x = torch.randn(5, 12)
    assert type(ours) is lr.LowRankLinear
    assert ours.rank == int(torch.linalg.matrix_rank(theirs.weight.to_matrix().detach().reshape(8, 12)))
    assert relative(ours(x), theirs(x)) < TIGHT


def test_their_linear_layer_of_low_matrix_rank_becomes_small():
    theirs = tltorch.FactorizedLinear((3, 4), (2, 4), factorization="cp", rank=2)
    assert from_tltorch(theirs).rank == 2
    flat = tltorch.FactorizedLinear((12,), (8,), factorization="cp", rank=11)
    assert from_tltorch(flat).rank == 8
    x = torch.randn(5, 12)
    assert relative(from_tltorch(flat)(x), flat(x)) < TIGHT


# ------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("shape", [(24, 12), (23, 13), (50, 1)], ids=str)
@pytest.mark.parametrize("origin", ["random", "decomposed"])
@pytest.mark.parametrize("kind", [lr.LowRankEmbedding, lr.TensorizedEmbedding])
def test_embeddings_go_there_and_back(kind, shape, origin):
    ours = kind(*shape, rank=3) if origin == "random" else kind.from_dense(nn.Embedding(*shape), rank=3)
    theirs = to_tltorch(ours)
    x = torch.randint(shape[0], (3, 7))
    assert type(theirs) is tltorch.FactorizedEmbedding
    assert relative(theirs(x), ours(x)) < TIGHT
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    back = from_tltorch(theirs)
    assert type(back) is kind
    assert (back.rank, back.form, back.num_embeddings) == (ours.rank, ours.form, shape[0])
    assert relative(back(x), ours(x)) < TIGHT
    assert_unshared(ours, theirs)
    assert_unshared(back, theirs)


@pytest.mark.parametrize("factorization", ["blocktt", "cp", "tucker"])
@pytest.mark.parametrize("shape", [(64, 27), (30, 16), (13, 8)], ids=str)
def test_their_embeddings_become_ours(factorization, shape):
    theirs = tltorch.FactorizedEmbedding(*shape, factorization=factorization, rank=4)
    ours = from_tltorch(theirs)
    x = torch.arange(shape[0])
    assert type(ours) is (lr.TensorizedEmbedding if factorization == "blocktt" else lr.LowRankEmbedding)
    assert ours.num_embeddings == shape[0]
    assert relative(ours(x), theirs(x)) < TIGHT
    assert relative(to_tltorch(ours)(x), theirs(x)) < TIGHT


@pytest.mark.parametrize("modes", [2, 3])
def test_their_decomposed_embedding_becomes_ours(modes):
    theirs = tltorch.FactorizedEmbedding.from_embedding(nn.Embedding(64, 27), rank=6, n_tensorized_modes=modes)
    assert relative(from_tltorch(theirs)(torch.arange(64)), theirs(torch.arange(64))) < TIGHT


def test_padding_that_the_factors_make_zero_is_dropped():
    ours = lr.LowRankEmbedding(20, 6, padding_idx=3, rank=2)
    theirs = to_tltorch(ours)
    assert relative(theirs(torch.arange(20)), ours(torch.arange(20))) < TIGHT
    assert from_tltorch(theirs).padding_idx is None


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "make",
    [
        lambda: lr.LowRankLinear(6, 5, rank=2, dtype=torch.float64),
        lambda: lr.TuckerConv2d(6, 5, 3, rank=2, dtype=torch.float64),
        lambda: lr.TensorizedEmbedding(20, 6, rank=2, dtype=torch.float64),
    ],
)
def test_dtype_mode_and_gradient_flags_are_kept(make):
    for learns in (True, False):
        ours = make().train(learns)
        ours.requires_grad_(learns)
        theirs = to_tltorch(ours)
        back = from_tltorch(theirs)
        for module in (theirs, back):
            assert module.training == learns
            assert {p.dtype for p in module.parameters()} == {torch.float64}
            assert {p.requires_grad for p in module.parameters()} == {learns}


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tltorch", None)
    for convert in (to_tltorch, from_tltorch):
        with pytest.raises(lr.MissingExtraError, match=r"lowrank-layers\[tensorly\]"):
            convert(lr.LowRankLinear(4, 4, rank=2))


# ------------------------------------------------------------------------------------------------------- oracles


def test_values_are_tensorlys():
    tensorly.set_backend("pytorch")
    tensor = torch.randn(6, 5, 4, dtype=torch.float64)
    cp = lr.cp(tensor, rank=3)
    assert relative(cp.to_dense(), tensorly.cp_to_tensor((cp.weights, list(cp.factors)))) < 1e-12
    tucker = lr.tucker(tensor, rank=(3, 2, 4))
    assert relative(tucker.to_dense(), tensorly.tucker_to_tensor((tucker.core, list(tucker.factors)))) < 1e-12
    train = lr.TensorizedEmbedding(27, 8, rank=3, dtype=torch.float64).factors()
    flat = tensorly.tt_to_tensor([core.flatten(1, 2) for core in train.cores])
    dense = flat.reshape(3, 2, 3, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(27, 8)
    assert relative(train.to_dense(), dense) < 1e-12


# ------------------------------------------------------------------------------------------------------ pipeline


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = tltorch.FactorizedEmbedding(64, 48, rank=4)
        self.conv = tltorch.FactorizedConv(48, 32, (3,), padding=1, bias=True, factorization="tucker", rank=0.3)
        self.conv.reset_parameters(std=0.1)
        self.linear = tltorch.FactorizedLinear((4, 8), (4, 8), factorization="blocktt", rank=4)
        nn.init.zeros_(self.linear.bias)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.conv(self.words(x).mT)).mean(-1)
        return self.head(torch.relu(self.linear(features)))


def test_a_model_of_theirs_is_converted_opened_and_planned():
    model = Theirs()
    x = torch.randint(64, (5, 7))
    expected = model(x)
    for name, child in list(model.named_children()):
        if type(child).__module__.startswith("tltorch"):
            setattr(model, name, from_tltorch(child))
    assert relative(model(x), expected) < TIGHT
    assert not any(type(module).__module__.startswith("tltorch") for module in model.modules())
    before = sum(p.numel() for p in model.parameters())
    lr.densify_(model)
    assert relative(model(x), expected) < TIGHT
    plan = lr.make_plan(model, lr.Budget(params=0.5), lr.calibrate(model, [x]))
    lr.factorize_(model, plan)
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * plan.total.params
    assert before < plan.total.params
    assert bool(model(x).isfinite().all())
