"""Factorizations as values: sizes, truncation, errors, and multiplying out."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import lowrank_layers as lr


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    """A factorization.

    Args:
        value: the factorization.
        shape: shape of the dense tensor.
        rank: its rank.
        size: number of values stored.
        dense: the dense tensor by definition.
        cut: makes a rank argument of ``truncate`` from one integer; ``None`` where there is no ``truncate``.
    """

    value: lr.Factorization
    shape: tuple[int, ...]
    rank: int | tuple[int, ...]
    size: int
    dense: Tensor
    cut: object = lambda rank: rank


def rows() -> dict[str, Row]:
    u, s, vh = draw(6, 3), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), draw(3, 5)
    core, a, b = draw(2, 3, 4), draw(6, 2), draw(5, 3)
    weights, x, y, z = torch.tensor([2.0, 1.0], dtype=torch.float64), draw(6, 2), draw(5, 2), draw(4, 2)
    w, h = draw(6, 2).abs(), draw(2, 5).abs()
    first, last = draw(1, 2, 3, 2), draw(2, 4, 2, 1)
    train = torch.einsum("aijr,rklb->ikjl", first, last).reshape(8, 6)[:7]
    other = draw(6, 3)
    return {
        "svd": Row(lr.SVD(u, s, vh), (6, 5), 3, 18 + 3 + 15, torch.einsum("ir,r,rj->ij", u, s, vh)),
        "tucker": Row(
            lr.Tucker(core, (a, b, None)),
            (6, 5, 4),
            (2, 3, 4),
            24 + 12 + 15,
            torch.einsum("abk,ia,jb->ijk", core, a, b),
            lambda rank: (rank, rank, None),
        ),
        "cp": Row(
            lr.CP(weights, (x, y, z)), (6, 5, 4), 2, 2 + 12 + 10 + 8, torch.einsum("r,ir,jr,kr->ijk", weights, x, y, z)
        ),
        "nmf": Row(lr.NMF(w, h), (6, 5), 2, 12 + 10, torch.einsum("ir,rj->ij", w, h)),
        "block tt": Row(lr.BlockTT((first, last), 7), (7, 6), (2,), 12 + 16, train, lambda rank: (rank,)),
        "blocks": Row(
            lr.Blocks((lr.SVD(u, s, vh), lr.SVD(other, s, vh))),
            (12, 5),
            3,
            2 * (18 + 3 + 15),
            torch.cat([(u * s) @ vh, (other * s) @ vh]),
            None,
        ),
    }


NAMES = list(rows())
kinds = pytest.mark.parametrize("name", NAMES)
truncated = pytest.mark.parametrize("name", [name for name, row in rows().items() if row.cut is not None])


@kinds
def test_shapes_and_sizes(name):
    row = rows()[name]
    assert isinstance(row.value, lr.Factorization)
    assert row.value.shape == row.shape
    assert row.value.rank == row.rank
    assert row.value.numel() == row.size


@kinds
def test_dense_is_the_defining_sum(name):
    row = rows()[name]
    assert row.value.to_dense().shape == row.shape
    assert torch.allclose(row.value.to_dense(), row.dense, rtol=1e-12)


@kinds
def test_relative_error(name):
    f = rows()[name].value
    dense = f.to_dense()
    assert f.relative_error(dense) == 0
    assert f.relative_error(2 * dense) == pytest.approx(0.5)
    assert f.relative_error(-dense) == pytest.approx(2)
    assert f.relative_error(dense.float()) == pytest.approx(0, abs=1e-7)
    assert f.relative_error(torch.zeros_like(dense)) == pytest.approx(float(dense.norm()))
    assert isinstance(f.relative_error(dense.requires_grad_()), float)


@kinds
def test_relative_error_wants_the_shape_that_was_factorized(name):
    f = rows()[name].value
    shape = rf"\({', '.join(map(str, f.shape))}\)"
    with pytest.raises(lr.LowRankError, match=rf"^relative_error: got a tensor of shape \(5, 7\), expected {shape}"):
        f.relative_error(torch.zeros(5, 7))


@pytest.mark.parametrize("name", ["svd", "nmf"])
def test_relative_error_of_a_sparse_matrix_is_that_of_its_dense_form(name):
    f = rows()[name].value
    matrix = torch.where(draw(6, 5) > 0, draw(6, 5), 0)
    assert f.relative_error(matrix.to_sparse()) == pytest.approx(f.relative_error(matrix), rel=1e-8)
    with pytest.raises(lr.LowRankError, match=r"^relative_error: got a matrix of shape \(5, 6\), expected \(6, 5\)"):
        f.relative_error(matrix.mT.to_sparse())


@kinds
def test_they_are_frozen(name):
    f = rows()[name].value
    for field in dataclasses.fields(f):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(f, field.name, None)


@truncated
def test_truncating_to_more_changes_nothing(name):
    row = rows()[name]
    same = row.value.truncate(row.cut(9))
    if name == "block tt":  # whose rounding goes through QR and SVD
        assert torch.allclose(same.to_dense(), row.value.to_dense(), rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(same.to_dense(), row.value.to_dense())
    assert same.rank == row.rank


@truncated
def test_truncating_to_less_gives_that_rank(name):
    row = rows()[name]
    less = row.value.truncate(row.cut(1))
    assert type(less) is type(row.value)
    assert less.shape == row.shape
    assert less.numel() < row.size
    assert less.rank == (
        1 if isinstance(row.rank, int) else tuple(r or n for r, n in zip(row.cut(1), row.rank, strict=True))
    )


@truncated
@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "a"], ids=repr)
def test_bad_truncations_are_refused(name, bad):
    row = rows()[name]
    with pytest.raises(lr.LowRankError, match=r"truncate: got rank=.*expected an integer of at least 1"):
        row.value.truncate(row.cut(bad))


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
    f = rows()["tucker"].value
    assert f.truncate((1, None, None)).rank == (1, 3, 4)
    with pytest.raises(lr.LowRankError, match=r"^Tucker.truncate: got 2 ranks, expected 3"):
        f.truncate((1, 1))
    with pytest.raises(lr.LowRankError, match=r"^Tucker.truncate: mode 2 was left whole"):
        f.truncate((1, 1, 1))


def test_balanced_cp_factors():
    f = rows()["cp"].value
    balanced = f.balanced()
    assert torch.allclose(torch.einsum("ir,jr,kr->ijk", *balanced), f.to_dense(), atol=1e-12)
    ratios = [(b.norm(dim=0) / a.norm(dim=0)) for a, b in zip(f.factors, balanced, strict=True)]
    for ratio in ratios:
        assert torch.allclose(ratio, f.weights ** (1 / 3), atol=1e-12)


def test_a_truncated_cp_drops_the_smallest_components():
    f = rows()["cp"].value
    kept = f.truncate(1)
    expected = 2.0 * torch.einsum("i,j,k->ijk", *(factor[:, 0] for factor in f.factors))
    assert torch.allclose(kept.to_dense(), expected, atol=1e-12)


def test_a_truncated_nmf_keeps_the_largest_components_in_their_order():
    w, h = torch.eye(4)[:, :3] * torch.tensor([1.0, 5.0, 0.1]), torch.eye(4)[:3] * torch.tensor([[2.0], [0.1], [30.0]])
    kept = lr.NMF(w, h).truncate(2)
    assert torch.equal(kept.w, w[:, [0, 2]])
    assert torch.equal(kept.h, h[[0, 2]])
    assert torch.equal(lr.NMF(w, h).truncate(1).h, h[[2]])
