"""What every decomposition promises, checked for every row of DECOMPOSITIONS."""

import math

import pytest
import torch

import lowrank_layers as lr

from ..decompose.tensors import distance_from_orthonormal
from .tables import BAD_RANKS, DECOMPOSITIONS, HALF_TOLERANCE, HALVES, relative

rows = pytest.mark.parametrize("row", DECOMPOSITIONS, ids=lambda row: row.name)


def parts(f: lr.Factorization) -> list[torch.Tensor]:
    """Every tensor that a factorization holds."""
    values = [part for value in vars(f).values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in values if part is not None]


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
