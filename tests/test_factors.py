"""Factorizations as values: sizes, truncation, errors, and the ways back to a dense tensor."""

import dataclasses

import pytest
import torch
from torch import Tensor

import lowrank_layers as lr


def values() -> list[lr.Factorization]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return [
        lr.SVD(draw(6, 3), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), draw(3, 5)),
        lr.Tucker(draw(2, 3, 4), (draw(6, 2), draw(5, 3), None)),
        lr.CP(torch.tensor([2.0, 1.0], dtype=torch.float64), (draw(6, 2), draw(5, 2), draw(4, 2))),
        lr.NMF(draw(6, 2).abs(), draw(2, 5).abs()),
    ]


kinds = pytest.mark.parametrize("k", range(4), ids=["svd", "tucker", "cp", "nmf"])


@kinds
def test_shapes_and_sizes(k):
    f = values()[k]
    assert isinstance(f, lr.Factorization)
    assert f.shape == [(6, 5), (6, 5, 4), (6, 5, 4), (6, 5)][k]
    assert f.rank == [3, (2, 3, 4), 2, 2][k]
    assert f.numel() == [18 + 3 + 15, 24 + 12 + 15, 2 + 12 + 10 + 8, 12 + 10][k]
    assert f.to_dense().shape == f.shape


@kinds
def test_dense_is_the_defining_sum(k):
    f = values()[k]
    if k == 0:
        expected = torch.einsum("ir,r,rj->ij", f.u, f.s, f.vh)
    elif k == 1:
        expected = torch.einsum("abk,ia,jb->ijk", f.core, f.factors[0], f.factors[1])
    elif k == 2:
        expected = torch.einsum("r,ir,jr,kr->ijk", f.weights, *f.factors)
    else:
        expected = torch.einsum("ir,rj->ij", f.w, f.h)
    assert torch.allclose(f.to_dense(), expected, rtol=1e-12)


@kinds
def test_relative_error(k):
    f = values()[k]
    dense = f.to_dense()
    assert f.relative_error(dense) == 0
    assert f.relative_error(2 * dense) == pytest.approx(0.5)
    assert f.relative_error(-dense) == pytest.approx(2)
    assert f.relative_error(dense.float()) == pytest.approx(0, abs=1e-7)
    assert f.relative_error(torch.zeros_like(dense)) == pytest.approx(float(dense.norm()))
    assert isinstance(f.relative_error(dense.requires_grad_()), float)


@kinds
def test_relative_error_wants_the_shape_that_was_factorized(k):
    f = values()[k]
    with pytest.raises(lr.LowRankError, match=r"^relative_error: got a tensor of shape \(5, 6\), expected \(6, 5"):
        f.relative_error(torch.zeros(5, 6))


@kinds
def test_they_are_frozen(k):
    f = values()[k]
    for field in dataclasses.fields(f):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(f, field.name, None)


@kinds
def test_truncating_to_more_changes_nothing(k):
    f = values()[k]
    rank = (9, 9, None) if k == 1 else 9
    assert torch.equal(f.truncate(rank).to_dense(), f.to_dense())
    assert f.truncate(rank).rank == f.rank


@kinds
@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "a"], ids=repr)
def test_bad_truncations_are_refused(k, bad):
    with pytest.raises(lr.LowRankError, match=r"truncate: got rank=.*expected an integer of at least 1"):
        values()[k].truncate((bad, bad, None) if k == 1 else bad)


def test_a_truncated_svd_is_the_svd_of_that_rank():
    matrix = torch.randn(9, 7, dtype=torch.float64)
    full = lr.svd(matrix)
    for rank in (1, 3, 6):
        assert torch.allclose(full.truncate(rank).to_dense(), lr.svd(matrix, rank).to_dense(), atol=1e-12)
        assert full.truncate(rank).rank == rank


def test_the_balanced_pair_of_an_svd():
    f = lr.svd(torch.randn(9, 7, dtype=torch.float64), 4)
    left, right = f.pair()
    assert left.shape == (9, 4)
    assert right.shape == (4, 7)
    assert torch.allclose(left @ right, f.to_dense(), atol=1e-12)
    assert torch.allclose(left.mT @ left, torch.diag(f.s), atol=1e-12)
    assert torch.allclose(right @ right.mT, torch.diag(f.s), atol=1e-12)


def test_a_truncated_hosvd_is_the_projection_of_the_tensor():
    """Truncating the core of a full HOSVD projects every mode on its leading vectors."""
    tensor = torch.randn(6, 5, 3, dtype=torch.float64)
    full = lr.tucker(tensor, (6, 5, None), sweeps=0)
    expected = tensor
    for mode, rank in ((0, 3), (1, 2)):
        u = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1)).U[:, :rank]
        expected = torch.tensordot(u @ u.mT, expected, dims=([1], [mode])).movedim(0, mode)
    got = full.truncate((3, 2, None))
    assert got.rank == (3, 2, 3)
    assert torch.allclose(got.to_dense(), expected, atol=1e-10)


def test_tucker_truncation_wants_one_entry_per_mode_and_none_for_whole_modes():
    f = values()[1]
    assert f.truncate((1, None, None)).rank == (1, 3, 4)
    with pytest.raises(lr.LowRankError, match=r"^Tucker.truncate: got 2 ranks, expected 3"):
        f.truncate((1, 1))
    with pytest.raises(lr.LowRankError, match=r"^Tucker.truncate: mode 2 was left whole"):
        f.truncate((1, 1, 1))


def test_balanced_cp_factors():
    f = values()[2]
    balanced = f.balanced()
    assert torch.allclose(torch.einsum("ir,jr,kr->ijk", *balanced), f.to_dense(), atol=1e-12)
    ratios = [(b.norm(dim=0) / a.norm(dim=0)) for a, b in zip(f.factors, balanced, strict=True)]
    for ratio in ratios:
        assert torch.allclose(ratio, f.weights ** (1 / 3), atol=1e-12)


def test_a_truncated_cp_drops_the_smallest_components():
    f = values()[2]
    kept = f.truncate(1)
    expected = 2.0 * torch.einsum("i,j,k->ijk", *(factor[:, 0] for factor in f.factors))
    assert torch.allclose(kept.to_dense(), expected, atol=1e-12)


def test_a_truncated_nmf_keeps_the_largest_components_in_their_order():
    w, h = torch.eye(4)[:, :3] * torch.tensor([1.0, 5.0, 0.1]), torch.eye(4)[:3] * torch.tensor([[2.0], [0.1], [30.0]])
    kept = lr.NMF(w, h).truncate(2)
    assert torch.equal(kept.w, w[:, [0, 2]])
    assert torch.equal(kept.h, h[[0, 2]])
    assert torch.equal(lr.NMF(w, h).truncate(1).h, h[[2]])
