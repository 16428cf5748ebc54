"""The CP decomposition: tensors of exact rank, and its canonical form."""

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

import lowrank_layers as lr

from ..contracts.tables import DERANDOMIZED
from .tensors import low_cp_rank, randn, with_spectrum


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
def test_it_recovers_a_tensor_of_exactly_that_rank(shape, rank, dtype):
    tensor = low_cp_rank(shape, rank, seed=3, dtype=dtype)
    f = lr.cp(tensor, rank, sweeps=1000, tolerance=1e-9)
    assert f.rank == rank
    # ||T||^2 - 2 <T, M> + ||M||^2 cancels: its root, by which the sweeps stop, is known to about sqrt(eps)
    assert f.relative_error(tensor) < (1e-3 if dtype == torch.float32 else 1e-6)
    assert_canonical(f)
    assert lr.cp(tensor, rank).relative_error(tensor) < 1e-2


def test_it_recovers_the_components_themselves():
    """Unlike Tucker's, they are unique (Kruskal, 1977)."""
    columns = [torch.linalg.qr(randn(n, 3, seed=n)).Q for n in (9, 8, 7)]
    weights = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    tensor = torch.einsum("r,ir,jr,kr->ijk", weights, *columns)
    f = lr.cp(tensor, 3, sweeps=500, tolerance=1e-12)
    assert torch.allclose(f.weights, weights, rtol=1e-6)
    for got, expected in zip(f.factors, columns, strict=True):
        assert torch.allclose((got.mT @ expected).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


def test_the_order_of_the_modes_changes_little():
    """Every order ends in a minimum of the same quality, whichever mode a sweep solves first."""
    tensor = low_cp_rank((8, 6, 5), 3) + 0.1 * randn(8, 6, 5)
    errors = [
        lr.cp(each, 3, sweeps=300, tolerance=1e-10).relative_error(each)
        for each in (tensor.permute(order) for order in itertools.permutations(range(3)))
    ]
    assert max(errors) == pytest.approx(min(errors), rel=1e-6)


def test_gradients_flow_through_the_factors():
    f = lr.cp(randn(6, 5, 4), 2)
    for part in (f.weights, *f.factors):
        part.requires_grad_().square().sum().backward()
        assert torch.equal(part.grad, 2 * part)


@pytest.mark.parametrize("shape", [(4, 3, 5), (20, 20, 20)], ids=str)
def test_zeros_stay_zeros(shape):
    f = lr.cp(torch.zeros(shape), 2)
    assert torch.equal(f.to_dense(), torch.zeros(shape))


@DERANDOMIZED
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple),
    rank=st.integers(1, 40),
    seed=st.integers(0, 2**20),
)
def test_it_is_canonical_and_exact_at_the_largest_rank(shape, rank, seed):
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


def test_more_starts_are_never_worse_by_much_and_seeds_repeat():
    tensor = randn(7, 6, 5)
    first = lr.cp(tensor, 4, starts=3, seed=5)
    assert torch.equal(first.weights, lr.cp(tensor, 4, starts=3, seed=5).weights)
    assert not torch.equal(first.weights, lr.cp(tensor, 4, starts=3, seed=6, sweeps=1).weights)
    assert first.relative_error(tensor) <= lr.cp(tensor, 4, starts=1).relative_error(tensor) * 1.05


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "a"], ids=repr)
@pytest.mark.parametrize("name", ["sweeps", "starts"])
def test_bad_counts_are_refused(name, bad):
    with pytest.raises(lr.LowRankError, match=f"^cp: got {name}={bad!r}"):
        lr.cp(randn(4, 3, 2), 1, **{name: bad})
