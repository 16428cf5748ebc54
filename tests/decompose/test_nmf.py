"""Non-negative matrix factorization: it descends, it ends at a stationary point, and it is no worse than its peer."""

import functools
import importlib
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.decomposition import NMF
from sklearn.decomposition._nmf import _initialize_nmf
from sklearn.exceptions import ConvergenceWarning

import lowrank_layers as lr
from benchmarks import data
from benchmarks.nmf import objective
from lowrank_layers.linalg import SparseMatrix

from ..contracts.tables import DERANDOMIZED, generator

PAIRS = [("hals", "frobenius", "cd"), ("mu", "frobenius", "mu"), ("mu", "kl", "mu")]
pairs = pytest.mark.parametrize(("solver", "loss"), [pair[:2] for pair in PAIRS])
inits = pytest.mark.parametrize("init", ["nndsvda", "nndsvd", "random"])


@functools.cache
def corpus(name: str) -> torch.Tensor:
    """A part of a data set, for speed."""
    if name == "digits":
        return data.digits()[:600]
    return data.olivetti_faces()[:120, ::8] if name == "faces" else data.newsgroup_counts(400)[::6]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def low_rank(m: int, n: int, rank: int, *, seed: int = 0) -> torch.Tensor:
    """Exactly of that rank, a third of either factor's entries zero."""
    w, h = rand(m, rank, seed=seed), rand(rank, n, seed=seed + 1)
    return torch.where(w > 1 / 3, w, 0) @ torch.where(h > 1 / 3, h, 0)


def mostly_zero(m: int, n: int, *, seed: int = 0) -> torch.Tensor:
    return torch.where(rand(m, n, seed=seed) > 0.95, rand(m, n, seed=seed + 1), 0)


def nonnegative(f: lr.NMF) -> bool:
    return all(bool(torch.isfinite(part).all() and (part >= 0).all()) for part in (f.w, f.h))


SUBJECTS = {"dense": rand(60, 40), "low rank": low_rank(50, 70, 8), "mostly zero": mostly_zero(280, 250)}


@pairs
@inits
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_objective_never_grows(solver, loss, init, subject):
    """Fewer sweeps are a prefix of more: this reads the objective after every one of them."""
    matrix = SUBJECTS[subject]
    settings = {"solver": solver, "loss": loss, "init": init, "tolerance": 0}
    start = objective(matrix, lr.nmf(matrix, 5, sweeps=0, **settings), loss)
    found = [lr.nmf(matrix, 5, sweeps=sweeps, **settings) for sweeps in range(1, 21)]
    values = [objective(matrix, f, loss) for f in found]
    assert all(map(nonnegative, found))
    assert values[0] < start
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))


@pairs
def test_a_matrix_of_exactly_that_rank_is_recovered(solver, loss):
    matrix = low_rank(60, 50, 4, seed=2)
    f = lr.nmf(matrix, 4, solver=solver, loss=loss, sweeps=2000, tolerance=1e-6)
    assert f.relative_error(matrix) < (1e-5 if solver == "hals" else 1e-2)
    assert lr.nmf(matrix.float(), 4).relative_error(matrix) < 1e-2


@pairs
def test_it_ends_where_no_entry_can_move(solver, loss):
    """Karush, Kuhn and Tucker: the gradient vanishes where an entry is positive, and is not negative where it is 0."""
    matrix = rand(30, 20, seed=3)
    f = lr.nmf(matrix, 4, solver=solver, loss=loss, sweeps=5000, tolerance=0)
    w, h = f.w.clone().requires_grad_(), f.h.clone().requires_grad_()
    model = w @ h
    (0.5 * (matrix - model).square() if loss == "frobenius" else model - torch.xlogy(matrix, model)).sum().backward()
    for factor, scale in ((w, matrix @ f.h.mT), (h, f.w.mT @ matrix)):
        projected = torch.where(factor > 1e-7, factor.grad, factor.grad.clamp_max(0))
        assert float((projected * factor.detach()).abs().max() / scale.max()) < 1e-5
        assert float(projected.abs().max() / scale.max()) < 2e-3


@pytest.mark.parametrize("shape", [(12, 9), (9, 30), (60, 8)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_start_is_that_of_sklearn(shape, rank):
    matrix = rand(*shape, seed=4)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:
        exact = lambda x, k, **_: (u[:, :k], s[:k], vh[:k])  # noqa: E731
        patch.setattr("sklearn.decomposition._nmf._randomized_svd", exact)
        w, h = _initialize_nmf(matrix.numpy(), rank, init="nndsvd")
    f = lr.nmf(matrix, rank, init="nndsvd", sweeps=0)
    order = np.argsort(-np.linalg.norm(w, axis=0) * np.linalg.norm(h, axis=1), kind="stable")
    # it drops entries below 1e-6
    assert np.allclose(f.w.numpy(), w[:, order], atol=2e-6)
    assert np.allclose(f.h.numpy(), h[order], atol=2e-6)


@pytest.mark.parametrize("name", ["digits", "faces", "newsgroups"])
@pytest.mark.parametrize(("solver", "loss", "peer"), PAIRS)
@pytest.mark.parametrize("rank", [5, 12])
def test_it_is_no_worse_than_sklearn(name, solver, loss, peer, rank):
    if name != "digits" and not data.available("nmf"):
        pytest.skip("needs nmf in LOWRANK_DATA")
    matrix = corpus(name)
    beta = {"frobenius": "frobenius", "kl": "kullback-leibler"}[loss]
    model = NMF(rank, solver=peer, beta_loss=beta, init="nndsvda", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        w = model.fit_transform(matrix.numpy())
    theirs = objective(matrix, lr.NMF(torch.from_numpy(w), torch.from_numpy(model.components_)), loss)
    f = lr.nmf(matrix, rank, solver=solver, loss=loss)
    assert nonnegative(f)
    assert objective(matrix, f, loss) <= 1.01 * theirs


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
def test_products_that_skip_the_zeros_are_those_that_do_not(kernels, monkeypatch):
    module = importlib.import_module("lowrank_layers.linalg.nonnegative.products")
    matrix, w, h = mostly_zero(400, 300), rand(6, 400), rand(6, 300, seed=1)
    assert isinstance(module.products_of(matrix), module.SparseProducts)
    monkeypatch.setattr(module, "_has_kernels", lambda tensor: kernels)
    # an entry that is stored and zero says nothing
    stored = matrix.to_sparse_coo() + torch.sparse_coo_tensor(
        [[0], [0]], [0.0], matrix.shape, dtype=matrix.dtype, check_invariants=True
    )
    sparse, dense = module.SparseProducts(SparseMatrix.of(stored)), module.DenseProducts(matrix)
    assert torch.allclose(sparse.left(w), dense.left(w))
    assert torch.allclose(sparse.right(h), dense.right(h))
    assert torch.allclose(sparse.quotient_left(w, h), dense.quotient_left(w, h))
    (product, log), (expected, expected_log) = sparse.quotient_right(w, h), dense.quotient_right(w, h)
    assert torch.allclose(product, expected)
    assert log == pytest.approx(expected_log)


# ------------------------------------------------------------------------------------------------- new rows


@pytest.mark.parametrize(("loss", "peer"), [("frobenius", "cd"), ("kl", "mu")])
@pytest.mark.parametrize("shape", [(60, 40), (12, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_of_new_rows_are_those_of_sklearn(loss, peer, shape, dtype):
    matrix = low_rank(*shape, 6) + 0.1 * rand(*shape, seed=5)
    model = NMF(5, solver=peer, beta_loss={"kl": "kullback-leibler"}.get(loss, loss), tol=1e-12, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(matrix.numpy())
        new = low_rank(9, shape[1], 6, seed=3) + 0.1 * rand(9, shape[1], seed=6)
        theirs = torch.from_numpy(model.transform(new.numpy()))
    f = lr.NMF(torch.ones(1, 5, dtype=dtype), torch.from_numpy(model.components_).to(dtype))
    ours = f.transform(new.to(dtype), loss=loss, sweeps=20_000, tolerance=1e-10 if dtype == torch.float64 else 1e-7)
    assert ours.dtype == dtype
    assert ours.shape == (9, 5)
    assert bool((ours >= 0).all())
    assert torch.allclose(ours.double(), theirs, atol=(1e-5 if dtype == torch.float64 else 1e-3) * float(theirs.max()))
    assert objective(new, lr.NMF(ours.double(), f.h.double()), loss) <= 1.0001 * objective(
        new, lr.NMF(theirs, f.h.double()), loss
    )


@pytest.mark.parametrize("loss", ["frobenius", "kl"])
def test_weights_of_the_factorized_rows_are_no_worse_than_those_found_with_the_components(loss):
    matrix = rand(30, 20, seed=3)
    f = lr.nmf(matrix, 4, solver="mu" if loss == "kl" else "hals", loss=loss, sweeps=30)
    again = lr.NMF(f.transform(matrix, loss=loss, tolerance=1e-9), f.h)
    assert objective(matrix, again, loss) <= objective(matrix, f, loss) * (1 + 1e-9)


@pytest.mark.parametrize("loss", ["frobenius", "kl"])
def test_units_of_new_rows_and_components_do_not_matter(loss):
    f = lr.nmf(rand(30, 20), 3)
    new = rand(5, 20, seed=1)
    expected = f.transform(new, loss=loss)
    for scale in (2.0**-400, 2.0**400):
        assert torch.allclose(f.transform(new * scale, loss=loss), expected * scale, rtol=1e-12, atol=0)
        other = lr.NMF(f.w, f.h * scale)
        assert torch.allclose(other.transform(new, loss=loss), expected / scale, rtol=1e-12, atol=0)
    assert not f.transform(torch.zeros(2, 20), loss=loss).any()
    assert torch.equal(f.transform(new.to_sparse(), loss=loss) > 0, expected > 0)
    assert torch.allclose(f.transform(new.to_sparse(), loss=loss), expected)


def test_new_rows_that_do_not_fit_are_refused():
    f = lr.nmf(rand(8, 6), 2)
    for call, why in (
        (lambda: f.transform(rand(3, 5)), r"shape \(3, 5\), expected 6 columns"),
        (lambda: f.transform(-rand(3, 6)), "negative entry"),
        (lambda: f.transform(torch.full((3, 6), math.nan)), "NaN"),
        (lambda: f.transform(rand(3, 6), loss="is"), "loss 'is', expected 'frobenius' or 'kl'"),
        (lambda: f.transform(rand(3, 6), sweeps=-1), "sweeps=-1"),
        (lambda: f.transform(rand(3, 6), tolerance=-1), "tolerance=-1"),
        (lambda: f.transform([[1.0] * 6]), "list, expected a torch.Tensor"),
    ):
        with pytest.raises(lr.LowRankError, match=f"^NMF.transform: got (a )?{why}"):
            call()


@pairs
@inits
def test_zero_rows_and_columns_stay_zero(solver, loss, init):
    matrix = rand(12, 9)
    matrix[[0, 5]], matrix[:, [2, 8]] = 0, 0
    f = lr.nmf(matrix, 3, solver=solver, loss=loss, init=init)
    assert nonnegative(f)
    assert float(f.to_dense()[[0, 5]].max()) < 1e-9
    assert float(f.to_dense()[:, [2, 8]].max()) < 1e-9


@pairs
@inits
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-37, 1e38])
def test_constant_matrices(solver, loss, init, value):
    matrix = torch.full((8, 6), value)
    f = lr.nmf(matrix, 3, solver=solver, loss=loss, init=init)
    assert nonnegative(f)
    assert torch.allclose(f.to_dense(), matrix, rtol=1e-2, atol=0)


@DERANDOMIZED
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    rank=st.integers(1, 16),
    pair=st.sampled_from(PAIRS),
    init=st.sampled_from(["nndsvda", "nndsvd", "random"]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_rank(shape, rank, pair, init, seed):
    matrix = rand(*shape, seed=seed)
    f = lr.nmf(matrix, rank, solver=pair[0], loss=pair[1], init=init, sweeps=15, seed=seed)
    assert f.shape == shape
    assert f.rank == min(rank, *shape)
    assert nonnegative(f)
    assert f.relative_error(matrix) < (1e-12 if rank >= min(shape) else 1)
    sizes = f.w.norm(dim=0) * f.h.norm(dim=1)
    assert rank >= min(shape) or bool((sizes[:-1] >= sizes[1:] * (1 - 1e-12)).all())


def test_seeds_repeat_and_differ():
    matrix = rand(20, 15)
    first, same, other = (lr.nmf(matrix, 4, init="random", sweeps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.w, same.w)
    assert not torch.equal(first.w, other.w)


def test_a_larger_tolerance_stops_earlier():
    matrix = rand(40, 30)
    errors = [lr.nmf(matrix, 5, tolerance=tolerance).relative_error(matrix) for tolerance in (0.5, 1e-3, 0)]
    assert errors[0] > errors[1] >= errors[2]


BAD = {
    "negative": ({"matrix": torch.tensor([[1.0, -0.5], [0.0, 2.0]])}, r"negative entry \(-0.5\).*clamp_min"),
    "three modes": ({"matrix": torch.ones(2, 3, 4)}, r"shape \(2, 3, 4\), expected 2 dimensions"),
    "rank": ({"rank": 0}, "rank 0, expected an integer of at least 1"),
    "solver": ({"solver": "als"}, "solver 'als', expected 'hals' or 'mu'"),
    "loss": ({"loss": "is"}, "loss 'is', expected 'frobenius' or 'kl'"),
    "init": ({"init": "zeros"}, "init 'zeros', expected 'nndsvda', 'nndsvd' or 'random'"),
    "hals for kl": ({"loss": "kl"}, "solver 'hals' with loss 'kl', expected solver 'mu'"),
    "sweeps": ({"sweeps": -1}, "sweeps=-1, expected an integer of at least 0"),
    "sweeps as a float": ({"sweeps": 2.0}, "sweeps=2.0"),
    "tolerance": ({"tolerance": -1e-3}, "tolerance=-0.001, expected a number of at least 0"),
    "tolerance NaN": ({"tolerance": float("nan")}, "tolerance=nan"),
    "tolerance as text": ({"tolerance": "small"}, "tolerance='small'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused(case):
    change, why = BAD[case]
    with pytest.raises(lr.LowRankError, match=f"^nmf: got (a )?{why}"):
        lr.nmf(**{"matrix": torch.ones(4, 3), "rank": 2, **change})
