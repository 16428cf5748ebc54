"""The identities of multilinear algebra (Kolda and Bader, 2009, sections 2.4 to 2.6)."""

import tensorly
import torch
from hypothesis import given, settings, strategies as st

from lowrank_layers.linalg import fold, khatri_rao, mode_product, unfold

derandomized = settings(deadline=None, derandomize=True, max_examples=40)
shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@derandomized
@given(shape=shapes)
def test_unfolding_and_folding_back(shape):
    tensor = draw(*shape)
    for mode, n in enumerate(shape):
        matrix = unfold(tensor, mode)
        assert matrix.shape == (n, tensor.numel() // n)
        assert torch.equal(fold(matrix, mode, shape), tensor)
        with tensorly.backend_context("numpy"):  # tensorly-torch, once imported, moves it to torch
            assert torch.equal(matrix, torch.from_numpy(tensorly.unfold(tensor.numpy(), mode).copy()))
        # rows are slices
        assert torch.equal(matrix[-1], tensor.select(mode, n - 1).flatten())


@derandomized
@given(shape=shapes, rows=st.integers(1, 6))
def test_mode_product_multiplies_the_unfolding(shape, rows):
    tensor = draw(*shape)
    for mode, n in enumerate(shape):
        matrix = draw(rows, n, seed=mode + 1)
        result = mode_product(tensor, matrix, mode)
        assert result.shape == (*shape[:mode], rows, *shape[mode + 1 :])
        assert torch.allclose(unfold(result, mode), matrix @ unfold(tensor, mode), atol=1e-12)


def test_products_on_different_modes_commute_and_on_one_mode_compose():
    tensor, a, b, c = draw(3, 4, 5), draw(2, 3, seed=1), draw(6, 5, seed=2), draw(4, 2, seed=3)
    assert torch.allclose(
        mode_product(mode_product(tensor, a, 0), b, 2), mode_product(mode_product(tensor, b, 2), a, 0), atol=1e-12
    )
    assert torch.allclose(mode_product(mode_product(tensor, a, 0), c, 0), mode_product(tensor, c @ a, 0), atol=1e-12)


def test_unfolding_a_tucker_product_is_a_kronecker_product():
    core, a, b, c = draw(2, 3, 2), draw(4, 2, seed=1), draw(5, 3, seed=2), draw(3, 2, seed=3)
    tensor = mode_product(mode_product(mode_product(core, a, 0), b, 1), c, 2)
    assert torch.allclose(unfold(tensor, 0), a @ unfold(core, 0) @ torch.kron(b, c).mT, atol=1e-12)
    assert torch.allclose(unfold(tensor, 1), b @ unfold(core, 1) @ torch.kron(a, c).mT, atol=1e-12)


@derandomized
@given(m=st.integers(1, 5), n=st.integers(1, 5), r=st.integers(1, 4))
def test_khatri_rao_columns_are_kronecker_products(m, n, r):
    a, b = draw(m, r), draw(n, r, seed=1)
    product = khatri_rao(a, b)
    assert product.shape == (m * n, r)
    for k in range(r):
        assert torch.allclose(product[:, k], torch.kron(a[:, k], b[:, k]), atol=1e-12)
    # (A kr B)^T (A kr B) = A^T A * B^T B
    assert torch.allclose(product.mT @ product, (a.mT @ a) * (b.mT @ b), atol=1e-12)


def test_unfolding_a_cp_sum_is_a_khatri_rao_product():
    a, b, c = draw(4, 3), draw(5, 3, seed=1), draw(6, 3, seed=2)
    tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
    assert torch.allclose(unfold(tensor, 0), a @ khatri_rao(b, c).mT, atol=1e-12)
    assert torch.allclose(unfold(tensor, 1), b @ khatri_rao(a, c).mT, atol=1e-12)
    assert torch.allclose(unfold(tensor, 2), c @ khatri_rao(a, b).mT, atol=1e-12)
