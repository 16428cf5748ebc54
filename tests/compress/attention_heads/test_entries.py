"""Fewer entries: the best ones, as the truncated SVD of the weighted product says, real and complex."""

import pytest
import torch
from torch import Tensor

from lowrank_layers.compress.attention_heads.entries import losses_of, maps_to, refit


def rows(count: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, n, dtype=dtype) @ torch.randn(n, n, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_maps_are_the_truncated_svd_of_the_product_of_both_sides(dtype):
    """With ``A`` the readers' rows and ``B`` the entries': all scores are ``conj(A) B^T``, and those that stay too."""
    a, b = rows(40, 5, dtype), rows(30, 5, dtype)
    readers, moment = a.mT @ a.conj(), b.mT @ b.conj()
    scores = a.conj() @ b.mT
    u, s, vh = torch.linalg.svd(scores, full_matrices=False)
    losses = losses_of(readers, moment)
    for size in range(1, 6):
        to_readers, to_entries = maps_to(readers, moment, size)
        kept = (a @ to_readers.mT).conj() @ (b @ to_entries.mT).mT
        assert torch.allclose(kept, (u[:, :size] * s[:size]) @ vh[:size])
        assert losses[size].item() == pytest.approx(s[size:].square().sum().item(), abs=1e-8 * s[0].item() ** 2)
        energies = [(x @ x.mH).diagonal().real for x in (to_readers @ a.mT, to_entries @ b.mT)]
        assert torch.allclose(*energies)  # balanced
    assert losses[0].item() == pytest.approx(scores.abs().square().sum().item())


def test_many_at_once_are_each_by_itself():
    readers, moment = (torch.stack([x.mT @ x.conj() for x in (rows(9, 4, torch.complex128),) * 2]) for _ in range(2))
    assert torch.allclose(losses_of(readers, moment)[1], losses_of(readers[1], moment[1]))


def test_values_of_a_group_keep_the_best_product_with_all_their_readers():
    """The truncated SVD of ``X^(1/2) W_v^T W_o^T``, over the columns of both heads that read the values."""
    x, value = rows(50, 8, torch.float64), torch.randn(6, 8, dtype=torch.float64)
    outputs = torch.randn(2, 7, 6, dtype=torch.float64)
    moment = value @ (x.mT @ x) @ value.mT
    to_readers, to_values = maps_to((outputs.mT @ outputs).sum(0), moment, 3)
    product = x @ value.mT @ outputs.flatten(0, 1).mT
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    projector = to_readers.mT @ to_values
    assert torch.allclose(x @ value.mT @ projector.mT @ outputs.flatten(0, 1).mT, (u[:, :3] * s[:3]) @ vh[:3])


def test_a_singular_moment_is_kept_whole_by_as_many_entries_as_its_rank():
    a, b = rows(20, 6, torch.float64), rows(20, 2, torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    to_readers, to_entries = maps_to(a.mT @ a, b.mT @ b, 2)
    assert torch.allclose(a @ to_readers.mT @ (b @ to_entries.mT).mT, a @ b.mT, atol=1e-6)


def test_the_refit_is_least_squares_on_the_entries_that_stay():
    x, weight, kept = rows(60, 6, torch.float64), torch.randn(4, 6).double(), torch.randn(3, 6).double()
    solution = torch.linalg.lstsq(x @ kept.mT, x @ weight.mT).solution
    assert torch.allclose(refit(weight, x.mT @ x, kept), solution.mT)
