"""Anderson acceleration of linear iterations, where it is GMRES (Walker and Ni, 2011, theorem 2.2)."""

import torch

from lowrank_layers.decompose.anderson import DEPTH, Anderson

from .tensors import randn


def test_it_ends_in_as_many_steps_as_there_are_unknowns():
    """``x <- A x + b`` in ``n`` unknowns: ``n`` differences span the space, so the next iterate is the solution."""
    n = DEPTH
    matrices = 0.9 * torch.linalg.qr(randn(3, n, n)).Q
    offsets = randn(3, n, seed=1)
    solutions = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - matrices, offsets)
    x = torch.zeros(3, n, dtype=torch.float64)
    anderson = Anderson(x)
    for _ in range(n + 1):
        plain = x = anderson.next(x, (matrices @ x[:, :, None])[:, :, 0] + offsets, torch.ones(3, dtype=torch.bool))
    assert torch.allclose(plain, solutions, rtol=1e-6)
    assert torch.linalg.vector_norm(solutions) * 0.9**n > 1e-2  # what a plain iteration leaves


def test_a_row_that_is_not_accepted_starts_anew():
    accepted = torch.tensor([True, False])
    x = randn(2, 8)
    anderson = Anderson(x)
    for step in range(3):
        value = randn(2, 8, seed=step + 1)
        x = anderson.next(x, value, accepted if step == 2 else accepted | True)
    assert torch.equal(x[1], value[1])
    assert not torch.allclose(x[0], value[0])


def test_kept_rows_go_on_as_if_they_had_been_alone():
    x = randn(3, 8)
    both, alone = Anderson(x), Anderson(x[1:2])
    everything = torch.ones(3, dtype=torch.bool)
    for step in range(4):
        value = randn(3, 8, seed=step + 1)
        if step == 2:
            both.keep(torch.tensor([1]))
        rows = slice(1, 2) if step >= 2 else slice(None)
        found = both.next(x[rows], value[rows], everything[rows])
        expected = alone.next(x[1:2], value[1:2], everything[:1])
    assert torch.allclose(found, expected)
