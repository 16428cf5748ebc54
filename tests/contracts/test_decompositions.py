"""What every decomposition promises, checked for every row of DECOMPOSITIONS, and what is particular to each."""

import math

import pytest
import tensorly
import torch
from hypothesis import given, strategies as st
from tensorly.decomposition import parafac, partial_tucker

import lowrank_layers as lr

from .tables import (
    BAD_RANKS,
    DECOMPOSITIONS,
    DERANDOMIZED,
    HALF_TOLERANCE,
    HALVES,
    SVD_METHODS,
    generator,
    relative,
)

rows = pytest.mark.parametrize("row", DECOMPOSITIONS, ids=lambda row: row.name)
methods = pytest.mark.parametrize("method", SVD_METHODS)

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))
seeds = st.integers(0, 2**20)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def distance_from_orthonormal(matrix: torch.Tensor) -> float:
    gram = matrix.double().mT @ matrix.double()
    return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())


def parts(f: lr.Factorization) -> list[torch.Tensor]:
    """Every tensor that a factorization holds."""
    values = [part for value in vars(f).values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in values if part is not None]


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(randn(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(randn(columns, len(values), seed=seed + 1)).Q
    return (left * values.double()) @ right.mT


def low_cp_rank(shape: tuple[int, ...], rank: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """A tensor of exactly that rank with components of different sizes."""
    columns = [randn(n, rank, seed=seed + k) for k, n in enumerate(shape)]
    columns[0] = columns[0] * torch.linspace(2, 1, rank, dtype=torch.float64)
    letters = "abcdef"[: len(shape)]
    return torch.einsum(f"{','.join(f'{x}r' for x in letters)}->{letters}", *columns).to(dtype)


def low_tucker_rank(shape: tuple[int, ...], rank: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    tensor = randn(*rank, seed=seed)
    for mode, n in enumerate(shape):
        factor = torch.linalg.qr(randn(n, rank[mode], seed=seed + mode + 1)).Q if n != rank[mode] else torch.eye(n)
        tensor = torch.tensordot(factor.double(), tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


# ----------------------------------------------------------------------------------------------- every decomposition


@rows
def test_full_rank_is_exact(row):
    tensor = row.sample()
    f = row(tensor, row.full(row.shape))
    assert isinstance(f, lr.Factorization)
    assert f.shape == row.shape
    assert f.relative_error(tensor) < row.exact
    assert f.relative_error(tensor) == pytest.approx(relative(f.to_dense(), tensor), abs=1e-12)
    assert row(tensor.float(), row.full(row.shape)).relative_error(tensor.float()) < 1e-5


@rows
def test_ranks_above_the_dimension_are_clamped(row):
    tensor = row.sample()
    full, above = row(tensor, row.full(row.shape)), row(tensor, row.rank(1000))
    assert above.rank == full.rank
    assert torch.equal(above.to_dense(), full.to_dense())


@rows
def test_the_rank_asked_for_is_the_rank_given_and_numel_counts_it(row):
    tensor = row.sample()
    for rank in (1, 2, 3):
        f = row(tensor, row.rank(rank))
        assert f.rank == row.rank(rank)
        assert f.numel() == sum(part.numel() for part in parts(f))


@rows
def test_the_error_falls_as_the_rank_grows(row):
    tensor = row.sample()
    errors = [row(tensor, row.rank(rank)).relative_error(tensor) for rank in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0] < 1


@rows
def test_factors_are_orthonormal(row):
    for seed, rank in ((0, 1), (1, 2), (2, 3)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            f = row(row.sample(seed=seed, dtype=dtype), row.rank(rank))
            for matrix in row.orthonormal(f):
                assert distance_from_orthonormal(matrix) < tolerance


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_the_dtype_comes_back(row, dtype):
    tensor = row.sample(dtype=dtype)
    f = row(tensor, row.full(row.shape))
    assert f.to_dense().dtype == dtype
    assert {part.dtype for part in parts(f)} == {dtype}
    tolerance = {torch.float32: 1e-5, torch.float64: row.exact, **HALF_TOLERANCE}[dtype]
    assert f.relative_error(tensor) < tolerance


@rows
def test_autocast_does_not_matter(row):
    """It is for the products of a forward pass, not for those of a decomposition."""
    tensor = row.sample(dtype=torch.float32)
    expected = row(tensor, row.rank(3)).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        got = row(tensor, row.rank(3))
    assert torch.equal(got.to_dense(), expected)


@rows
def test_memory_layout_does_not_matter(row):
    tensor = row.sample()
    reversed_modes = tensor.permute(*range(tensor.ndim)[::-1]).contiguous().permute(*range(tensor.ndim)[::-1])
    strided = torch.zeros(*row.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)
    expected = row(tensor, row.rank(2)).to_dense()
    for other in (reversed_modes, strided):
        assert not other.is_contiguous()
        assert relative(row(other, row.rank(2)).to_dense(), expected) < 1e-10


@rows
def test_the_result_owns_its_memory_and_the_input_is_untouched(row):
    tensor = row.sample()
    before = tensor.clone()
    ranks = [row.rank(2), row.full(row.shape)]
    if row.per_mode:
        ranks += [(None,) * tensor.ndim, (2, *(None,) * (tensor.ndim - 1))]
    for rank in ranks:
        f = row(tensor, rank)
        assert tensor.untyped_storage().data_ptr() not in [part.untyped_storage().data_ptr() for part in parts(f)]
    assert torch.equal(tensor, before)


@rows
def test_gradients_do_not_flow(row):
    tensor = row.sample().requires_grad_()
    f = row(tensor, row.rank(2))
    assert not f.to_dense().requires_grad
    assert tensor.requires_grad
    assert tensor.is_leaf
    assert tensor.grad is None
    assert relative(f.to_dense(), row(tensor.detach(), row.rank(2)).to_dense()) == 0
    downstream = row(tensor * 2, row.rank(2))
    assert not downstream.to_dense().requires_grad
    assert row(torch.nn.Parameter(tensor.detach()), row.rank(2)).to_dense().grad_fn is None


@rows
def test_global_random_state_is_untouched_and_the_result_repeats(row):
    tensor = row.sample()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = row(tensor, row.rank(3)).to_dense()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(row(tensor, row.rank(3)).to_dense(), first)


@rows
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (2.0**-50, torch.float32),
        (2.0**50, torch.float32),
        (2.0**-110, torch.float32),
        (2.0**110, torch.float32),
        (2.0**-110, torch.bfloat16),
        (2.0**-900, torch.float64),
        (2.0**900, torch.float64),
    ],
    ids=str,
)
def test_scaling_the_input_scales_the_result(row, scale, dtype):
    """Squares of entries like these are in no dtype."""
    tensor = row.sample(dtype=dtype)
    f = row(tensor, row.rank(2))
    expected = f.to_dense().double()
    scaled = row(tensor * scale, row.rank(2))
    assert relative(scaled.to_dense().double() / scale, expected) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert scaled.relative_error(tensor * scale) == pytest.approx(f.relative_error(tensor), rel=1e-2)


@rows
def test_a_result_beyond_half_precision_is_refused_with_the_remedy(row):
    """Entries of 6e4 are in fp16, their norm is not."""
    tensor = torch.full(row.shape, 6e4, dtype=torch.float16)
    if row.nonnegative:  # both factors have the square root of the size
        assert row(tensor, row.rank(2)).relative_error(tensor) < 1e-2
        return
    with pytest.raises(lr.LowRankError, match=rf"^{row.function.__name__}: .*float16, .*cannot hold.*\.float\(\)"):
        row(tensor, row.rank(2))


@rows
def test_zero_and_constant_tensors(row):
    zero = torch.zeros(row.shape)
    f = row(zero, row.rank(2))
    assert torch.equal(f.to_dense(), zero)
    assert f.relative_error(zero) == 0
    for matrix in row.orthonormal(f):
        assert distance_from_orthonormal(matrix) < 1e-5
    ones = torch.ones(row.shape)
    f = row(ones, row.rank(3))
    assert f.relative_error(ones) < 1e-5
    for matrix in row.orthonormal(f):
        assert distance_from_orthonormal(matrix) < 1e-5


@rows
def test_what_has_no_factorization_is_refused_by_name(row):
    good = row.sample()
    name = f"^{row.function.__name__}: got "
    spoilt = {value: good.clone() for value in (math.nan, math.inf, -math.inf)}
    for value, tensor in spoilt.items():
        tensor.view(-1)[3] = value
    refused = [
        (spoilt[math.nan], "NaN"),
        (spoilt[math.inf], "Inf"),
        (spoilt[-math.inf], "Inf"),
        (torch.zeros(0, *row.shape[1:]), "empty"),
        (torch.ones(row.shape, dtype=torch.int64), "int64.*floating-point"),
        (torch.ones(row.shape, dtype=torch.bool), "bool"),
        (torch.ones(row.shape, dtype=torch.complex64), "complex64"),
        (torch.ones(7), r"shape \(7,\).*dimensions"),
        (torch.tensor(1.0), r"shape \(\).*dimensions"),
        (torch.ones(row.shape, device="meta"), "meta"),
        ([[1.0, 2.0], [3.0, 4.0]], "list.*Tensor"),
    ]
    if row.sparse:
        assert relative(row(good.to_sparse(), row.rank(2)).to_dense(), row(good, row.rank(2)).to_dense()) < 1e-6
    else:
        refused.append((good.to_sparse(), "layout.*to_dense"))
    for tensor, why in refused:
        with pytest.raises(lr.LowRankError, match=name + f".*{why}|{name}{why}"):
            row(tensor, row.rank(1, getattr(tensor, "ndim", 2)))


@rows
@pytest.mark.parametrize("rank", BAD_RANKS, ids=repr)
def test_bad_ranks_are_refused_by_name(row, rank):
    with pytest.raises(lr.LowRankError, match=f"^{row.function.__name__}: got rank.*expected"):
        row(row.sample(), row.rank(rank))
    with pytest.raises(lr.LowRankError, match=f"^{row.function.__name__}: got rank.*expected"):
        row(row.sample(), rank)


# ------------------------------------------------------------------------------------------------------------- svd


@methods
@DERANDOMIZED
@given(shape=shapes, rank=st.integers(1, 16), seed=seeds)
def test_svd_error_is_the_tail_of_the_singular_values(method, shape, rank, seed):
    matrix = randn(*shape, seed=seed)
    f = lr.svd(matrix, rank, method=method)
    values = torch.linalg.svdvals(matrix)
    assert f.rank == min(rank, *shape)
    tail = float(torch.linalg.vector_norm(values[f.rank :]) / torch.linalg.vector_norm(values))
    # a square of 1e-16 is what the Gram matrix rounds away
    assert f.relative_error(matrix) == pytest.approx(tail, rel=1e-8, abs=1e-13)
    assert torch.allclose(f.s, values[: f.rank], rtol=1e-7, atol=1e-12)
    assert distance_from_orthonormal(f.u) < 1e-10
    assert distance_from_orthonormal(f.vh.mT) < 1e-6


@methods
@pytest.mark.parametrize("shape", [(60, 40), (24, 120), (120, 24), (1, 9), (9, 1)], ids=str)
def test_svd_of_a_decaying_spectrum(method, shape):
    values = 0.7 ** torch.arange(min(shape), dtype=torch.float64)
    matrix = with_spectrum(*shape, values)
    for rank in (1, 5, 12):
        f = lr.svd(matrix, rank, method=method)
        tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert f.relative_error(matrix) == pytest.approx(tail, rel=1e-6, abs=1e-13)
        assert bool((f.s[:-1] >= f.s[1:]).all())
        assert torch.allclose(f.s, values[:rank], rtol=1e-6)
        assert distance_from_orthonormal(f.u) < 1e-12
        assert distance_from_orthonormal(f.vh.mT) < 1e-12


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(20, 100), (100, 20), (30, 30)], ids=str)
def test_svd_vectors_are_orthonormal_when_the_matrix_has_less_than_the_rank(method, dtype, shape):
    matrix = randn(shape[0], 8, seed=1, dtype=dtype) @ randn(8, shape[1], seed=2, dtype=dtype)
    f = lr.svd(matrix, 15, method=method)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert f.relative_error(matrix) < tolerance
    assert distance_from_orthonormal(f.u) < tolerance
    assert distance_from_orthonormal(f.vh.mT) < tolerance


@methods
def test_svd_vectors_are_orthonormal_over_twelve_orders_of_magnitude(method):
    values = 10.0 ** -torch.arange(12, dtype=torch.float64)
    f = lr.svd(with_spectrum(12, 60, values), 10, method=method)
    assert torch.allclose(f.s[:7], values[:7], rtol=1e-5)
    assert distance_from_orthonormal(f.u) < 1e-10
    assert distance_from_orthonormal(f.vh.mT) < 1e-10


def test_svd_randomized_by_default_on_large_matrices_is_near_the_optimum():
    matrix = with_spectrum(600, 520, 1 / torch.arange(1, 521, dtype=torch.float64)).float()
    f = lr.svd(matrix, 20)
    best = lr.svd(matrix, 20, method="exact").relative_error(matrix)
    assert best <= f.relative_error(matrix) * (1 + 1e-6)
    assert f.relative_error(matrix) < best * 1.001
    assert torch.equal(lr.svd(matrix, 20, seed=0).u, f.u)
    assert not torch.equal(lr.svd(matrix, 20, seed=1).u, f.u)


def test_svd_without_a_rank_keeps_everything():
    matrix = randn(7, 4)
    assert lr.svd(matrix).rank == 4
    assert lr.svd(matrix).relative_error(matrix) < 1e-14


def test_svd_takes_matrices_only():
    with pytest.raises(lr.LowRankError, match=r"^svd: got shape \(2, 3, 4\), expected 2 dimensions"):
        lr.svd(torch.ones(2, 3, 4), 1)


def test_svd_refuses_unknown_methods():
    with pytest.raises(lr.LowRankError, match=r"^svd: got method 'lanczos', expected 'auto'"):
        lr.svd(torch.ones(2, 3), 1, method="lanczos")


# ---------------------------------------------------------------------------------------------------------- tucker


@DERANDOMIZED
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ranks=st.lists(st.none() | st.integers(1, 7), min_size=4, max_size=4),
    seed=seeds,
)
def test_tucker_error_stands_between_its_bounds(shape, ranks, seed):
    tensor = randn(*shape, seed=seed)
    ranks = tuple(ranks[: len(shape)])
    hooi, hosvd = lr.tucker(tensor, ranks), lr.tucker(tensor, ranks, sweeps=0)
    tails = [0.0]
    for mode, r in enumerate(ranks):
        if r is not None:
            values = torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1))
            tails.append(float(values[r:].square().sum() / values.square().sum()))
    assert hooi.shape == tuple(shape)
    assert hooi.rank == tuple(n if r is None else min(r, n) for n, r in zip(shape, ranks, strict=True))
    assert [factor is None for factor in hooi.factors] == [r is None for r in ranks]
    # De Lathauwer et al., 2000: no mode loses less than its tail, HOSVD no more than all the tails together
    assert max(tails) - 1e-12 <= hooi.relative_error(tensor) ** 2
    assert hooi.relative_error(tensor) <= hosvd.relative_error(tensor) + 1e-7
    assert hosvd.relative_error(tensor) ** 2 <= sum(tails) + 1e-12
    for factor in hooi.factors:
        assert factor is None or distance_from_orthonormal(factor) < 1e-10


@pytest.fixture(autouse=True)
def _tensorly_on_numpy():
    """Importing tensorly-torch moves tensorly to torch for the whole process."""
    with tensorly.backend_context("numpy"):
        yield


def tensorly_tucker_error(tensor: torch.Tensor, rank: tuple[int, ...]) -> float:
    """Of a fully converged ``partial_tucker`` of the first modes."""
    modes = list(range(len(rank)))
    (core, factors), _ = partial_tucker(tensor.numpy(), rank=rank, modes=modes, n_iter_max=200, tol=1e-9)
    return relative(torch.from_numpy(tensorly.tenalg.multi_mode_dot(core, factors, modes=modes)), tensor)


kernels = pytest.mark.parametrize(
    ("shape", "rank"),
    [((12, 10, 3, 3), (4, 3)), ((10, 12, 3, 3), (5, 2)), ((16, 8, 1, 1), (4, 4)), ((7, 13, 5, 3), (2, 6))],
    ids=str,
)


@kernels
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_tucker_is_as_good_as_tensorly_by_default(shape, rank, noise):
    for seed in range(3):
        tensor = low_tucker_rank(shape, (*rank, *shape[2:]), seed=seed)
        dirt = randn(*shape, seed=seed + 50)
        tensor = tensor + noise * dirt * tensor.norm() / dirt.norm()
        ours = lr.tucker(tensor, (*rank, None, None)).relative_error(tensor)
        assert ours <= tensorly_tucker_error(tensor, rank) * 1.001


@kernels
def test_tucker_is_as_good_as_tensorly_on_pure_noise(shape, rank):
    """Noise has many optima that differ by thousandths: what counts is the mean over some tensors."""
    ratios = []
    for seed in range(10):
        tensor = randn(*shape, seed=seed)
        ours = lr.tucker(tensor, (*rank, None, None), sweeps=200, tolerance=1e-9).relative_error(tensor)
        ratios.append(ours / tensorly_tucker_error(tensor, rank))
    assert sum(ratios) / len(ratios) <= 1.001


@pytest.mark.parametrize("shape", [(10, 8, 6), (5, 9, 4, 3)], ids=str)
def test_tucker_recovers_an_exact_multilinear_rank(shape):
    rank = (3, 2, 2, 2)[: len(shape)]
    tensor = low_tucker_rank(shape, rank)
    f = lr.tucker(tensor, rank)
    assert f.relative_error(tensor) < 1e-12
    for factor in f.factors:
        assert distance_from_orthonormal(factor) < 1e-12


def test_tucker_none_leaves_a_mode_whole():
    tensor = randn(6, 5, 3, 3)
    f = lr.tucker(tensor, (2, None, None, 2))
    assert f.core.shape == (2, 5, 3, 2)
    assert [factor is None for factor in f.factors] == [False, True, True, False]
    assert f.numel() == 2 * 5 * 3 * 2 + 6 * 2 + 3 * 2
    whole = lr.tucker(tensor, (None,) * 4)
    assert torch.equal(whole.to_dense(), tensor)
    assert whole.numel() == tensor.numel()


def test_tucker_of_one_mode_is_the_svd_of_its_unfolding():
    tensor = randn(6, 5, 3, 3)
    expected = lr.svd(tensor.flatten(1), 2)
    f = lr.tucker(tensor, (2, None, None, None))
    assert relative(f.to_dense(), expected.to_dense().reshape(tensor.shape)) < 1e-12


def test_tucker_of_a_matrix_is_its_svd():
    matrix = randn(9, 7)
    assert relative(lr.tucker(matrix, (3, 3)).to_dense(), lr.svd(matrix, 3).to_dense()) < 1e-6


def test_tucker_ill_conditioned_kernel_does_not_stall():
    """In fp32 the Gram matrix stalls at 3.3e-4 where fp64 reaches 1.2e-5."""
    tensor = low_tucker_rank((40, 30, 3, 3), (10, 10, 3, 3))
    for mode in (0, 1):
        f = lr.tucker(tensor, (10, 10, None, None))
        scale = 10.0 ** -(torch.arange(10, dtype=torch.float64) * 4 / 9)
        core = f.core.movedim(mode, -1) * scale
        tensor = lr.Tucker(core.movedim(-1, mode), f.factors).to_dense()
    f = lr.tucker(tensor.float(), (10, 10, None, None))
    assert f.relative_error(tensor.float()) < 1e-6


@pytest.mark.parametrize("rank", [3, (2, 2), (2, 2, 2, 2, 2), "2222", None, {2, 3}], ids=repr)
def test_tucker_takes_one_rank_a_mode(rank):
    with pytest.raises(lr.LowRankError, match=r"^tucker: got .*rank.*mode"):
        lr.tucker(randn(5, 4, 3, 3), rank)


def test_tucker_does_not_crush_the_spatial_modes():
    """A tenth of the numbers: with the kernel's own modes whole 0.1 is left, with a tenth of every mode 0.9."""
    kernel = low_tucker_rank((64, 64, 3, 3), (12, 12, 3, 3))
    noise = randn(64, 64, 3, 3, seed=9)
    kernel = kernel + 0.1 * noise * kernel.norm() / noise.norm()
    kept, crushed = lr.tucker(kernel, (12, 12, None, None)), lr.tucker(kernel, (43, 43, 1, 1))
    assert kept.numel() < 0.1 * kernel.numel()
    assert kept.numel() < crushed.numel()
    assert kept.relative_error(kernel) < 0.1
    assert crushed.relative_error(kernel) > 0.8
    assert kept.core.shape[2:] == (3, 3)


# -------------------------------------------------------------------------------------------------------------- cp


def assert_canonical(f: lr.CP) -> None:
    """Unit columns, weights from large to small, none negative."""
    for factor in f.factors:
        norms = torch.linalg.vector_norm(factor.double(), dim=0)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert bool((f.weights >= 0).all())
    assert bool((f.weights[:-1] >= f.weights[1:]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "rank"), [((9, 8, 7), 2), ((12, 10, 8), 4), ((8, 7, 3, 3), 3), ((20, 3, 4), 3), ((9, 9), 3)], ids=str
)
def test_cp_recovers_a_tensor_of_exactly_that_rank(shape, rank, dtype):
    tensor = low_cp_rank(shape, rank, seed=3, dtype=dtype)
    f = lr.cp(tensor, rank, sweeps=1000, tolerance=1e-9)
    assert f.rank == rank
    # ||T||^2 - 2 <T, M> + ||M||^2 cancels: its root, by which the sweeps stop, is known to about sqrt(eps)
    assert f.relative_error(tensor) < (1e-3 if dtype == torch.float32 else 1e-6)
    assert_canonical(f)
    assert lr.cp(tensor, rank).relative_error(tensor) < 1e-2


def test_cp_recovers_the_components_themselves():
    """Unlike Tucker's, they are unique (Kruskal, 1977)."""
    columns = [torch.linalg.qr(randn(n, 3, seed=n)).Q for n in (9, 8, 7)]
    weights = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    tensor = torch.einsum("r,ir,jr,kr->ijk", weights, *columns)
    f = lr.cp(tensor, 3, sweeps=500, tolerance=1e-12)
    assert torch.allclose(f.weights, weights, rtol=1e-6)
    for got, expected in zip(f.factors, columns, strict=True):
        assert torch.allclose((got.mT @ expected).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank"), [((8, 7, 6), 3), ((6, 5, 3, 3), 4), ((10, 4, 9), 6), ((16, 12, 3, 3), 8)], ids=str
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs")
def test_cp_is_as_good_as_tensorly(shape, rank, seed):
    tensor = low_cp_rank(shape, rank, seed=20 + seed)
    noise = randn(*shape, seed=40 + seed)
    tensor = tensor + 0.3 * noise * tensor.norm() / noise.norm()
    theirs = parafac(tensor.numpy(), rank, n_iter_max=200, tol=1e-9, init="svd", random_state=0)
    bound = relative(torch.from_numpy(tensorly.cp_to_tensor(theirs)), tensor)
    f = lr.cp(tensor, rank, sweeps=200, tolerance=1e-8)
    assert f.relative_error(tensor) <= bound * 1.001
    assert_canonical(f)


@DERANDOMIZED
@given(shape=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple), rank=st.integers(1, 40), seed=seeds)
def test_cp_is_canonical_and_exact_at_the_largest_rank(shape, rank, seed):
    tensor = randn(*shape, seed=seed)
    limit = math.prod(shape) // max(shape)
    f = lr.cp(tensor, rank, sweeps=10)
    assert f.rank == min(rank, limit)
    assert f.shape == shape
    assert f.relative_error(tensor) < (1e-6 if rank >= limit else 1)
    assert_canonical(f)
    assert f.numel() == f.rank * (1 + sum(shape))


def test_cp_of_a_matrix_is_its_svd():
    matrix = with_spectrum(9, 7, torch.tensor([5.0, 3.0, 2.0, 0.1, 0.05]))
    f = lr.cp(matrix, 3, sweeps=300, tolerance=1e-10)
    assert f.relative_error(matrix) == pytest.approx(lr.svd(matrix, 3).relative_error(matrix), rel=1e-4)


def test_cp_more_starts_are_never_worse_by_much_and_seeds_repeat():
    tensor = randn(7, 6, 5)
    first = lr.cp(tensor, 4, starts=3, seed=5)
    assert torch.equal(first.weights, lr.cp(tensor, 4, starts=3, seed=5).weights)
    assert not torch.equal(first.weights, lr.cp(tensor, 4, starts=3, seed=6, sweeps=1).weights)
    assert first.relative_error(tensor) <= lr.cp(tensor, 4, starts=1).relative_error(tensor) * 1.05


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "a"], ids=repr)
@pytest.mark.parametrize("name", ["sweeps", "starts"])
def test_cp_refuses_bad_counts(name, bad):
    with pytest.raises(lr.LowRankError, match=f"^cp: got {name} {bad!r}"):
        lr.cp(randn(4, 3, 2), 1, **{name: bad})
