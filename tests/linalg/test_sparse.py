"""Sparse matrices in svd and nmf: the result of the dense matrix, which is never formed where it is large."""

import importlib
import math

import pytest
import scipy.sparse
import torch

import lowrank_layers as lr
from lowrank_layers.linalg import SparseMatrix, krylov_svd

from ..contracts.tables import generator, relative

pytestmark = pytest.mark.filterwarnings(r"ignore:Sparse \w+ tensor support is in beta")

FORMS = {
    "coo": lambda dense: dense.to_sparse_coo(),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
    "bsr": lambda dense: dense.to_sparse_bsr((2, 2)),
    "coo with entries given twice": lambda dense: torch.sparse_coo_tensor(
        torch.cat([dense.nonzero().mT] * 2, 1),
        torch.cat([dense[dense != 0] / 2] * 2),
        dense.shape,
        check_invariants=True,
    ),
    "scipy csr": lambda dense: scipy.sparse.csr_matrix(dense.numpy()),
    "scipy csc array": lambda dense: scipy.sparse.csc_array(dense.numpy()),
    "scipy coo": lambda dense: scipy.sparse.coo_matrix(dense.numpy()),
    "scipy lil": lambda dense: scipy.sparse.lil_matrix(dense.numpy()),
}
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def counts(m: int, n: int, share: float = 0.08, seed: int = 0) -> torch.Tensor:
    """A matrix of mostly zeros whose singular values fall slowly, as those of texts do."""
    g = generator(seed)
    kept = torch.rand(m, n, generator=g, dtype=torch.float64) < share
    sizes = torch.rand(m, n, generator=g, dtype=torch.float64) / torch.arange(1, n + 1) ** 0.3
    return torch.where(kept, sizes, 0.0)


@pytest.fixture
def large(monkeypatch):
    """Every sparse matrix counts as large, and may not be made dense."""

    def to_dense(*unused):
        raise AssertionError("a large sparse matrix was made dense")

    for name in ("ranks", "svd"):
        monkeypatch.setattr(importlib.import_module(f"lowrank_layers.decompose.{name}"), "SMALL", 0)
    monkeypatch.setattr(SparseMatrix, "to_dense", to_dense)
    monkeypatch.setattr(torch.Tensor, "to_dense", to_dense)


@forms
@dtypes
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_svd_equals_that_of_the_dense_matrix(form, dtype, shape):
    dense = counts(*shape).to(dtype)
    sparse = FORMS[form](dense)
    expected, f = lr.svd(dense, 7), lr.svd(sparse, 7)
    assert f.u.dtype == dtype
    assert torch.allclose(f.s, expected.s, rtol=1e-5)
    assert relative(f.to_dense(), expected.to_dense()) < (1e-4 if dtype == torch.float32 else 1e-9)
    assert f.relative_error(sparse) == pytest.approx(f.relative_error(dense), rel=1e-4)
    assert lr.svd(sparse).relative_error(dense) < 1e-5
    for rule in (lr.Energy(0.8), lr.RelativeError(0.3), lr.ParameterFraction(0.25), lr.EVBMF()):
        assert lr.svd(sparse, rule).rank == lr.svd(dense, rule).rank


@dtypes
@pytest.mark.parametrize("method", ["auto", "gram", "krylov"])
@pytest.mark.parametrize("shape", [(150, 220), (220, 150)], ids=str)
@pytest.mark.parametrize("rank", [1, 10, 60])
def test_svd_of_a_large_matrix_never_makes_it_dense(large, dtype, method, shape, rank):
    dense = counts(*shape).to(dtype)
    sparse = SparseMatrix.of(dense)
    f = lr.svd(sparse.rows, rank, method=method)
    values = torch.linalg.svdvals(dense)
    assert torch.allclose(f.s, values[:rank], rtol=1e-5)
    best = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
    error = float(torch.linalg.vector_norm(dense - f.to_dense()) / torch.linalg.vector_norm(dense))
    assert error == pytest.approx(best, rel=1e-5)
    assert f.relative_error(sparse.rows) == pytest.approx(best, rel=1e-4)
    for side in (f.u, f.vh.mT):
        assert float((side.mT @ side - torch.eye(rank, dtype=dtype)).abs().max()) < 1e-4
    if dtype == torch.float64:
        for rule in (lr.Energy(0.8), lr.RelativeError(0.3), lr.ParameterFraction(0.25), lr.GavishDonoho()):
            assert lr.svd(sparse.rows, rule, method=method).rank == lr.svd(dense, rule).rank


def test_svd_krylov_of_a_tall_sparse_matrix_as_of_its_dense_form():
    """30,000 x 6,000 in 90,000 entries; 1.4 GB dense. What LAPACK would say, scipy's Lanczos says."""
    g = generator(1)
    places = torch.stack([torch.randint(size, (90_000,), generator=g) for size in (30_000, 6_000)])
    values = torch.rand(90_000, generator=g, dtype=torch.float64) / (1 + places[1] % 50)
    sparse = torch.sparse_coo_tensor(places, values, (30_000, 6_000), check_invariants=True)
    f = lr.svd(sparse, 12)
    peer = scipy.sparse.coo_matrix((values.numpy(), places.numpy()), shape=(30_000, 6_000)).tocsr()
    expected = scipy.sparse.linalg.svds(peer, 12, return_singular_vectors=False, random_state=0)
    assert torch.allclose(f.s, torch.from_numpy(expected.copy()).sort(descending=True).values, rtol=1e-8)
    with pytest.raises(lr.LowRankError, match=r"^svd: got method 'exact' and a sparse .*\(30000, 6000\).*'auto'"):
        lr.svd(sparse, 12, method="exact")
    with pytest.raises(lr.LowRankError, match=r"^svd: got a rank rule and a sparse .*6000 singular values.*integer"):
        lr.svd(sparse, lr.Energy(0.5))


@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (7, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "of low rank", "zero", "repeated values"])
def test_krylov_takes_dense_matrices_and_deficient_ones(shape, kind):
    matrix = counts(*shape, share=1)
    if kind == "of low rank":
        matrix = matrix[:, :1] @ matrix[:1]
    elif kind == "zero":
        matrix = torch.zeros_like(matrix)
    elif kind == "repeated values":
        matrix = torch.eye(*shape, dtype=torch.float64)
    rank = min(4, *shape)
    f = lr.svd(matrix, rank, method="krylov")
    assert torch.allclose(f.s, torch.linalg.svdvals(matrix)[:rank], rtol=1e-10, atol=1e-14)
    for side in (f.u, f.vh.mT):
        assert float((side.mT @ side - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-10
    u, s, vh = krylov_svd(matrix, rank)
    assert relative(u * s @ vh + 1, f.to_dense() + 1) < 1e-10


@forms
@pytest.mark.parametrize(("solver", "loss"), [("hals", "frobenius"), ("mu", "frobenius"), ("mu", "kl")])
@pytest.mark.parametrize("init", ["nndsvd", "nndsvda", "random"])
def test_nmf_equals_that_of_the_dense_matrix(form, solver, loss, init):
    """A dense matrix of this size and this many zeros is factorized without its zeros too, by the same updates."""
    dense = counts(300, 260)
    settings = {"solver": solver, "loss": loss, "init": init, "sweeps": 5, "tolerance": 0}
    f, expected = lr.nmf(FORMS[form](dense), 4, **settings), lr.nmf(dense, 4, **settings)
    assert relative(f.to_dense(), expected.to_dense()) < 1e-8
    assert f.relative_error(FORMS[form](dense)) == pytest.approx(expected.relative_error(dense), rel=1e-6)


@dtypes
@pytest.mark.parametrize(("solver", "loss"), [("hals", "frobenius"), ("mu", "kl")])
def test_nmf_of_a_large_matrix_never_makes_it_dense(large, dtype, solver, loss):
    dense = counts(400, 300).to(dtype)
    sparse = SparseMatrix.of(dense)
    settings = {"solver": solver, "loss": loss, "sweeps": 30}
    f = lr.nmf(sparse.rows, 6, **settings)
    assert f.relative_error(sparse.rows) == pytest.approx(lr.nmf(dense, 6, **settings).relative_error(dense), rel=1e-3)
    assert f.transform(sparse.rows, loss=loss).shape == (400, 6)
    assert lr.nmf(sparse.rows, lr.ParameterFraction(0.05), **settings).rank == int(0.05 * 400 * 300 / 700)


@pytest.mark.parametrize("function", [lr.svd, lr.nmf])
def test_nothing_but_zeros(function):
    empty = torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (6, 5), check_invariants=True)
    for sparse in (empty, empty.to_sparse_csr(), scipy.sparse.csr_matrix((6, 5))):
        f = function(sparse, 2)
        assert f.rank == 2
        assert not f.to_dense().any()
        assert f.relative_error(sparse) == 0


@pytest.mark.parametrize("function", [lr.svd, lr.nmf])
def test_full_rank_and_half_precision(function):
    dense = counts(9, 7, share=0.6)
    assert function(dense.to_sparse(), 100).relative_error(dense) < 1e-12
    for dtype in (torch.float16, torch.bfloat16):
        f = function(dense.to(dtype).to_sparse(), 3)
        assert f.to_dense().dtype == dtype
        assert f.relative_error(dense) == pytest.approx(function(dense, 3).relative_error(dense), rel=0.02)


@pytest.mark.parametrize("function", [lr.svd, lr.nmf])
def test_sparse_matrices_that_cannot_be_factorized_are_refused_by_name(function):
    sparse = counts(9, 7).to_sparse_coo()
    bad = sparse.clone()
    bad._values()[0] = math.nan
    refused = [
        (bad, "NaN"),
        (sparse.long(), "int64.*floating-point"),
        (torch.sparse_coo_tensor(size=(0, 4), check_invariants=True), "empty"),
        (torch.ones(2, 3, 4).to_sparse(), r"shape \(2, 3, 4\), expected 2 dimensions"),
        (scipy.sparse.csr_matrix([[1, 2], [3, 4]]), r"a sparse matrix of int64.*astype\('float32'\)"),
        (scipy.sparse.csr_matrix([[1.0, math.inf], [3, 4]]), "Inf"),
        ("matrix", "str, expected a torch.Tensor or a matrix of scipy.sparse"),
    ]
    for matrix, why in refused:
        with pytest.raises(lr.LowRankError, match=f"^{function.__name__}: got .*{why}|^{function.__name__}: got {why}"):
            function(matrix, 1)
    with pytest.raises(lr.LowRankError, match=r"^relative_error: got .*\(9, 7\), expected \(9, 6\)"):
        function(counts(9, 6), 2).relative_error(sparse)


def test_nmf_refuses_a_negative_entry_of_a_sparse_matrix():
    with pytest.raises(lr.LowRankError, match=r"^nmf: got a negative entry \(-2\)"):
        lr.nmf(torch.tensor([[1.0, 0], [0, -2]]).to_sparse(), 1)
