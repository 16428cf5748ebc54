"""The Tucker decomposition: De Lathauwer's bounds, tensors of exact multilinear rank, and tensorly as a peer."""

import pytest
import tensorly
import torch
from hypothesis import given, strategies as st
from tensorly.decomposition import partial_tucker

import lowrank_layers as lr

from ..contracts.tables import DERANDOMIZED, relative
from .tensors import distance_from_orthonormal, low_tucker_rank, randn


@DERANDOMIZED
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ranks=st.lists(st.none() | st.integers(1, 7), min_size=4, max_size=4),
    seed=st.integers(0, 2**20),
)
def test_the_error_stands_between_its_bounds(shape, ranks, seed):
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


def tensorly_tucker_error(tensor: torch.Tensor, rank: tuple[int, ...]) -> float:
    """The error of a fully converged ``partial_tucker`` of the first modes."""
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
def test_it_is_as_good_as_tensorly_by_default(shape, rank, noise):
    for seed in range(3):
        tensor = low_tucker_rank(shape, (*rank, *shape[2:]), seed=seed)
        dirt = randn(*shape, seed=seed + 50)
        tensor = tensor + noise * dirt * tensor.norm() / dirt.norm()
        ours = lr.tucker(tensor, (*rank, None, None)).relative_error(tensor)
        assert ours <= tensorly_tucker_error(tensor, rank) * 1.001


@kernels
def test_it_is_as_good_as_tensorly_on_pure_noise(shape, rank):
    """Noise has many optima that differ by thousandths: what counts is the mean over some tensors."""
    ratios = []
    for seed in range(10):
        tensor = randn(*shape, seed=seed)
        ours = lr.tucker(tensor, (*rank, None, None), sweeps=200, tolerance=1e-9).relative_error(tensor)
        ratios.append(ours / tensorly_tucker_error(tensor, rank))
    assert sum(ratios) / len(ratios) <= 1.001


@pytest.mark.parametrize("shape", [(10, 8, 6), (5, 9, 4, 3)], ids=str)
def test_it_recovers_an_exact_multilinear_rank(shape):
    rank = (3, 2, 2, 2)[: len(shape)]
    tensor = low_tucker_rank(shape, rank)
    f = lr.tucker(tensor, rank)
    assert f.relative_error(tensor) < 1e-12
    for factor in f.factors:
        assert distance_from_orthonormal(factor) < 1e-12


def test_none_leaves_a_mode_whole():
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


def test_an_ill_conditioned_kernel_does_not_stall():
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
def test_it_takes_one_rank_per_mode(rank):
    with pytest.raises(lr.LowRankError, match=r"^tucker: got .*rank.*mode"):
        lr.tucker(randn(5, 4, 3, 3), rank)


def test_it_does_not_crush_the_spatial_modes():
    """A tenth of the values: with the spatial modes whole the error is 0.1, with a tenth of every mode 0.9."""
    kernel = low_tucker_rank((64, 64, 3, 3), (12, 12, 3, 3))
    noise = randn(64, 64, 3, 3, seed=9)
    kernel = kernel + 0.1 * noise * kernel.norm() / noise.norm()
    kept, crushed = lr.tucker(kernel, (12, 12, None, None)), lr.tucker(kernel, (43, 43, 1, 1))
    assert kept.numel() < 0.1 * kernel.numel()
    assert kept.numel() < crushed.numel()
    assert kept.relative_error(kernel) < 0.1
    assert crushed.relative_error(kernel) > 0.8
    assert kept.core.shape[2:] == (3, 3)
