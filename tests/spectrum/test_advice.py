"""Advice agrees with what the factors really are."""

import pytest
import torch

import lowrank_layers as lr


@pytest.mark.parametrize("shape", [(40, 60), (64, 64), (7, 5)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("error", [0.05, 0.3])
def test_yes_where_a_smaller_pair_is_as_near_as_asked(shape, decay, error):
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    weight = (u * torch.arange(1, u.shape[1] + 1).double() ** -decay) @ vh
    smaller = [rank for rank in range(1, min(shape) + 1) if lr.svd(weight, rank).numel() < weight.numel()]
    near = [rank for rank in smaller if lr.svd(weight, rank).relative_error(weight) <= error]
    advice = lr.should_factorize(weight, error=error)
    assert bool(advice) == bool(near)
    assert advice.limit == max(smaller)
    assert advice.error == pytest.approx(lr.svd(weight, min(advice.rank, advice.limit)).relative_error(weight))
    if near:
        assert advice.rank == min(near)
    assert str(advice).startswith("yes" if near else "no")


def test_kernels_are_flattened_and_spectra_taken_as_they_are():
    kernel = torch.randn(16, 8, 3, 3)
    expected = lr.should_factorize(kernel.flatten(1))
    assert lr.should_factorize(kernel) == expected
    assert lr.should_factorize(lr.MatrixSpectrum.of(kernel.flatten(1))) == expected


def test_no_pair_is_smaller_than_a_thin_matrix():
    advice = lr.should_factorize(torch.randn(1, 50))
    assert not advice
    assert advice.limit == 0
    assert "not larger than a pair" in advice.reason


@pytest.mark.parametrize("error", [0, 1.0, True, "small"])
def test_refuses_errors(error):
    with pytest.raises(lr.LowRankError, match="RelativeError"):
        lr.should_factorize(torch.randn(4, 4), error=error)


def test_refuses_integers():
    with pytest.raises(lr.LowRankError, match=r"should_factorize: got torch\.int64"):
        lr.should_factorize(torch.ones(4, 4, dtype=torch.int64))
